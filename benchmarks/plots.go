//go:build linux

package main

import (
	"bytes"
	"image/color"
	"math"
	"os"
	"slices"
	"strconv"

	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

var (
	colorOurs   = color.NRGBA{R: 0x1b, G: 0x7a, B: 0x3d, A: 255}
	colorOther  = color.NRGBA{R: 0x8a, G: 0x93, B: 0x9e, A: 255}
	colorSecond = color.NRGBA{R: 0x2f, G: 0x6f, B: 0xb5, A: 255}
	colorFailed = color.NRGBA{R: 0xc6, G: 0x28, B: 0x28, A: 255}
)

func init() {
	plot.DefaultFont = font.Font{Typeface: "Liberation", Variant: "Sans"}
	plotter.DefaultFont = plot.DefaultFont
}

// save draws plots below each other, with their axes aligned.
func save(path string, width, height vg.Length, plots ...*plot.Plot) error {
	canvas := vgsvg.New(width, height)
	column := make([][]*plot.Plot, len(plots))
	for i, p := range plots {
		column[i] = []*plot.Plot{p}
	}
	dc := draw.New(canvas)
	dc.SetColor(color.White)
	dc.Fill(dc.Rectangle.Path())
	tiles := draw.Tiles{Rows: len(plots), Cols: 1, PadX: 6, PadY: 10, PadTop: 6, PadBottom: 6, PadLeft: 6, PadRight: 12}
	for i, row := range plot.Align(column, tiles, dc) {
		plots[i].Draw(row[0])
	}
	var out bytes.Buffer
	if _, err := canvas.WriteTo(&out); err != nil {
		return err
	}
	// A browser that has not this font would take one with serifs.
	svg := bytes.ReplaceAll(out.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:'Liberation Sans',Arial,Helvetica,sans-serif;"))
	return os.WriteFile(path, svg, 0o644)
}

func newPlot(title, x, y string) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Title.TextStyle.Font.Size = 12
	p.Title.Padding = 6
	p.Legend.Top, p.Legend.Left = true, true
	p.Legend.Padding = 3
	return p
}

// zeroAndLog is a scale on which zero has its place: linear up to about a
// tenth, and logarithmic beyond.
type zeroAndLog struct{}

func (zeroAndLog) Normalize(least, most, x float64) float64 {
	at := func(x float64) float64 { return math.Asinh(10 * x) }
	return (at(x) - at(least)) / (at(most) - at(least))
}

// plotFailed draws a bar for each peer.
func (r *results) plotFailed(path string) error {
	p := newPlot("Failed requests per upgrade (16 clients)", "failed requests per upgrade", "")
	names := slices.Clone(r.measured(requests))
	slices.Reverse(names) // the first one is to be on top
	most := 1.0
	var titles []string
	for i, name := range names {
		titles = append(titles, title(name))
		failed, _ := r.failedPerUpgrade(name, "")
		most = max(most, failed)
		bar, err := plotter.NewBarChart(plotter.Values{failed}, 14)
		if err != nil {
			return err
		}
		bar.Horizontal, bar.XMin = true, float64(i)
		bar.LineStyle.Width = 0
		bar.Color = colorOther
		if name == ours || name == "ours-shutdown" {
			bar.Color = colorOurs
		}
		label, err := plotter.NewLabels(plotter.XYLabels{XYs: plotter.XYs{{X: failed, Y: float64(i)}}, Labels: []string{perUpgrade(failed)}})
		if err != nil {
			return err
		}
		label.Offset = vg.Point{X: 4}
		label.TextStyle[0].YAlign = text.YCenter
		if bar.Color == colorOurs {
			label.TextStyle[0].Color = colorOurs
			label.TextStyle[0].Font.Weight = xfont.WeightBold
		}
		p.Add(bar, label)
	}
	p.NominalY(titles...)
	p.Y.Padding = 12 // room for a font that is wider than the one meant
	zero, err := plotter.NewLine(plotter.XYs{{X: 0, Y: -0.5}, {X: 0, Y: float64(len(names)) - 0.5}})
	if err != nil {
		return err
	}
	p.Add(zero)
	p.X.Scale = zeroAndLog{}
	p.X.Min, p.X.Max = 0, most*2
	var ticks plot.ConstantTicks
	for _, at := range []float64{0, 0.1, 1, 10, 100, 1000, 10000} {
		if at <= most*2 {
			ticks = append(ticks, plot.Tick{Value: at, Label: strconv.FormatFloat(at, 'g', -1, 64)})
		}
	}
	p.X.Tick.Marker = ticks
	return save(path, 620, vg.Length(90+26*len(names)), p)
}

// plotUpgrade draws the time of an upgrade by the number of listeners.
func (r *results) plotUpgrade(path string) error {
	p := newPlot("Time of an upgrade, from the signal to the commit", "listeners", "ms")
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	var ticks plot.ConstantTicks
	least := math.Inf(1)
	for i, c := range contenders {
		var points plotter.XYs
		for _, size := range r.sizes() {
			n := float64(number(size))
			commit := r.sample(upgrade, c, size, "commit").median()
			least = min(least, commit)
			points = append(points, plotter.XY{X: n, Y: commit})
			if i == 0 {
				ticks = append(ticks, plot.Tick{Value: n, Label: size})
			}
		}
		slices.SortFunc(points, func(a, b plotter.XY) int { return int(a.X - b.X) })
		line, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		line.Color = []color.Color{colorOurs, colorSecond, colorOther}[i]
		line.Width = 1.5
		if c == contenderFloor {
			line.Dashes = []vg.Length{4, 3}
		}
		dots.Shape, dots.Color = draw.CircleGlyph{}, line.Color
		p.Add(line, dots)
		p.Legend.Add(contenderTitle(c), line, dots)
	}
	p.X.Tick.Marker = ticks
	p.Y.Min = math.Pow(2, math.Floor(math.Log2(least)))
	p.Y.Tick.Marker = doublings{}
	return save(path, 620, 320, p)
}

// doublings are ticks at 1, 2, 4, 8, …
type doublings struct{}

func (doublings) Ticks(least, most float64) []plot.Tick {
	var ticks []plot.Tick
	for at := math.Pow(2, math.Floor(math.Log2(least))); at <= most; at *= 2 {
		if at >= least {
			ticks = append(ticks, plot.Tick{Value: at, Label: strconv.FormatFloat(at, 'g', 4, 64)})
		}
	}
	return ticks
}

// timelinePeers are those whose latency over time is drawn.
var timelinePeers = []string{ours, tableflip, "nginx", "haproxy", "restart"}

// plotTimeline draws the slowest answer of each moment, for some peers, all to the
// same scale.
func (r *results) plotTimeline(path string) error {
	var plots []*plot.Plot
	names := slices.DeleteFunc(slices.Clone(timelinePeers), func(name string) bool { return len(r.abouts(timeline, name)) == 0 })
	most := 1.0
	for _, row := range r.rows {
		if row.measure == timeline && row.metric == "slowest" && slices.Contains(names, row.peer) {
			most = max(most, row.value)
		}
	}
	const least = 0.1
	for i, name := range names {
		p := newPlot(title(name), "", "ms")
		p.Title.TextStyle.Font.Size = 10
		p.Y.Scale = plot.LogScale{}
		var slowest, failed plotter.XYs
		end := 0.0
		for _, row := range r.rows {
			if row.measure != timeline || row.peer != name {
				continue
			}
			at := float64(number(row.about)) / 1000
			end = max(end, at)
			switch row.metric {
			case "slowest":
				slowest = append(slowest, plotter.XY{X: at, Y: max(row.value, least)})
			case "failed":
				failed = append(failed, plotter.XY{X: at, Y: most})
			case "upgrade":
				line, err := plotter.NewLine(plotter.XYs{{X: at, Y: least}, {X: at, Y: most * 1.5}})
				if err != nil {
					return err
				}
				line.Color, line.Dashes = colorOther, []vg.Length{3, 2}
				p.Add(line)
			}
		}
		bars := &bins{XYs: slowest, width: timelineBin.Seconds(), color: colorOther}
		if name == ours {
			bars.color = colorOurs
		}
		crosses, err := plotter.NewScatter(failed)
		if err != nil && len(failed) > 0 {
			return err
		}
		p.Add(bars)
		if len(failed) > 0 {
			crosses.Shape, crosses.Color, crosses.Radius = draw.CrossGlyph{}, colorFailed, 3
			p.Add(crosses)
		}
		p.X.Min, p.X.Max = 0, math.Round(end)
		p.Y.Min, p.Y.Max = least, most*1.5
		p.Y.Tick.Marker = decades{}
		p.X.Tick.Marker = seconds{}
		if i < len(names)-1 {
			p.HideX()
		} else {
			p.X.Label.Text = "seconds; dashed lines: an upgrade begins; red crosses: failed requests"
		}
		plots = append(plots, p)
	}
	if len(plots) == 0 {
		return nil
	}
	return save(path, 720, vg.Length(50+95*len(plots)), plots...)
}

type seconds struct{}

func (seconds) Ticks(least, most float64) []plot.Tick {
	var ticks []plot.Tick
	for at := math.Ceil(least); at <= most; at++ {
		ticks = append(ticks, plot.Tick{Value: at, Label: strconv.FormatFloat(at, 'f', 0, 64)})
	}
	return ticks
}

// decades are ticks at 0.1, 1, 10, …
type decades struct{}

func (decades) Ticks(least, most float64) []plot.Tick {
	var ticks []plot.Tick
	for at := math.Pow(10, math.Floor(math.Log10(least))); at <= most; at *= 10 {
		ticks = append(ticks, plot.Tick{Value: at, Label: strconv.FormatFloat(at, 'g', 4, 64)})
	}
	return ticks
}

// bins draws a bar from the bottom for each point, as one shape.
type bins struct {
	plotter.XYs
	width float64
	color color.Color
}

func (b *bins) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	var path vg.Path
	for _, bin := range b.XYs {
		left, right, top := x(bin.X), x(bin.X+b.width), y(bin.Y)
		path.Move(vg.Point{X: left, Y: c.Min.Y})
		path.Line(vg.Point{X: left, Y: top})
		path.Line(vg.Point{X: right, Y: top})
		path.Line(vg.Point{X: right, Y: c.Min.Y})
		path.Close()
	}
	c.SetColor(b.color)
	c.Fill(path)
}

// plotSeries draws time and memory over many upgrades.
func (r *results) plotSeries(path string) error {
	times := newPlot("Many upgrades in a row: medians of each hundredth", "", "commit, ms")
	sizes := newPlot("", "upgrades", "memory, MiB")
	for i, c := range contenders {
		for _, drawn := range []struct {
			on     *plot.Plot
			metric string
			unit   float64
		}{{times, "commit", 1}, {sizes, "resident", 1024}} {
			rows := r.of(series, c, "", drawn.metric)
			var points plotter.XYs
			for part := range slices.Chunk(rows, max(1, len(rows)/100)) {
				points = append(points, plotter.XY{X: float64(part[0].round), Y: sampleOf(values(part)).median() / drawn.unit})
			}
			line, err := plotter.NewLine(points)
			if err != nil {
				return err
			}
			line.Color = []color.Color{colorOurs, colorSecond, colorOther}[i]
			drawn.on.Add(line)
			drawn.on.Y.Min = 0
			if drawn.on == times {
				times.Legend.Add(contenderTitle(c), line)
			}
		}
	}
	times.Legend.Top = false
	return save(path, 720, 380, times, sizes)
}

// plotDraining draws the time of an upgrade, and what the process in charge holds, by the
// number of generations that drain.
func (r *results) plotDraining(path string) error {
	times := newPlot("Upgrades while generations drain", "", "commit, ms")
	held := newPlot("", "generations that drain", "descriptors")
	for _, drawn := range []struct {
		on           *plot.Plot
		metric, name string
		title        string
		color        color.Color
	}{
		{times, "commit", kept, "as many drain", colorOurs},
		{times, "commit", ended, "none drains", colorOther},
		{held, "descriptors", kept, "", colorOurs},
		{held, "descriptors", ended, "", colorOther},
	} {
		var points plotter.XYs
		for _, about := range r.abouts(draining, ended) {
			points = append(points, plotter.XY{X: float64(number(about)), Y: r.sample(draining, drawn.name, about, drawn.metric).median()})
		}
		line, err := plotter.NewLine(points)
		if err != nil {
			return err
		}
		line.Color = drawn.color
		drawn.on.Add(line)
		drawn.on.Y.Min = 0
		if drawn.title != "" {
			drawn.on.Legend.Add(drawn.title, line)
		}
	}
	times.Legend.Top = false
	return save(path, 620, 340, times, held)
}
