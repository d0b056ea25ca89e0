//go:build linux

package main

import (
	"encoding/csv"
	"fmt"
	"io"
	"slices"
	"strconv"

	"golang.org/x/perf/benchmath"
)

// A row is one measured value. The report and the plots are made of rows alone, so
// that they can be made again from the CSV file.
type row struct {
	measure, peer string
	about         string // kind of client, number of listeners, …
	metric, unit  string
	round         int
	value         float64
	text          string // instead of a value
}

// The measures.
const (
	requests = "requests" // failed requests, by kind of client
	handover = "handover" // who answers, and when
	failures = "failures" // what went wrong, by category
	latency  = "latency"
	timeline = "timeline" // latency over time
	upgrade  = "upgrade"  // time, by number of listeners
	memory   = "memory"   // by number of listeners
	steady   = "steady"   // connections accepted
	imported = "import"   // size and start of a binary
	series   = "series"   // many upgrades in a row
	draining = "draining" // by number of generations that drain
	setting  = "setting"  // machine, versions, date, durations
)

type results struct{ rows []row }

func (r *results) add(measure, peer, about, metric, unit string, round int, value float64) {
	r.rows = append(r.rows, row{measure: measure, peer: peer, about: about, metric: metric, unit: unit, round: round, value: value})
}

func (r *results) set(metric, text string) {
	r.rows = append(r.rows, row{measure: setting, metric: metric, text: text})
}

// of returns the rows of one metric in the order in which they were measured.
func (r *results) of(measure, peer, about, metric string) []row {
	return slices.DeleteFunc(slices.Clone(r.rows), func(row row) bool {
		return row.measure != measure || row.peer != peer || row.about != about || row.metric != metric
	})
}

// abouts returns what is known of a peer in a measure, in the order of measuring.
func (r *results) abouts(measure, peer string) []string {
	var abouts []string
	for _, row := range r.rows {
		if row.measure == measure && row.peer == peer && !slices.Contains(abouts, row.about) {
			abouts = append(abouts, row.about)
		}
	}
	return abouts
}

func (r *results) sample(measure, peer, about, metric string) sample {
	return sampleOf(values(r.of(measure, peer, about, metric)))
}

func values(rows []row) []float64 {
	var values []float64
	for _, row := range rows {
		values = append(values, row.value)
	}
	return values
}

func (r *results) sum(measure, peer, about, metric string) float64 {
	sum := 0.0
	for _, row := range r.of(measure, peer, about, metric) {
		sum += row.value
	}
	return sum
}

// sample is the values of one metric.
type sample struct{ *benchmath.Sample }

func sampleOf(values []float64) sample {
	return sample{benchmath.NewSample(slices.Clone(values), &benchmath.DefaultThresholds)}
}

func (s sample) empty() bool { return len(s.Values) == 0 }

func (s sample) median() float64 { return benchmath.AssumeNothing.Summary(s.Sample, 0.95).Center }

// format gives the median and, of several values, the range.
func (s sample) format(verb string) string {
	if s.empty() {
		return "–"
	}
	return withRange(fmt.Sprintf(verb, s.median()), fmt.Sprintf(verb, s.Values[0]), fmt.Sprintf(verb, s.Values[len(s.Values)-1]))
}

// differs reports whether two samples can hardly come from the same distribution.
func (s sample) differs(other sample) bool {
	if s.empty() || other.empty() {
		return false
	}
	c := benchmath.AssumeNothing.Compare(s.Sample, other.Sample)
	return c.P < c.Alpha
}

var csvHeader = []string{"measure", "peer", "about", "metric", "unit", "round", "value"}

func (r *results) write(w io.Writer) error {
	out := csv.NewWriter(w)
	out.Write(csvHeader)
	for _, row := range r.rows {
		value := row.text
		if value == "" {
			value = strconv.FormatFloat(row.value, 'g', 6, 64)
		}
		out.Write([]string{row.measure, row.peer, row.about, row.metric, row.unit, strconv.Itoa(row.round), value})
	}
	out.Flush()
	return out.Error()
}

func readResults(from io.Reader) (*results, error) {
	in := csv.NewReader(from)
	in.FieldsPerRecord = len(csvHeader)
	records, err := in.ReadAll()
	if err != nil {
		return nil, err
	}
	r := &results{}
	for _, record := range records[min(1, len(records)):] {
		row := row{measure: record[0], peer: record[1], about: record[2], metric: record[3], unit: record[4]}
		if row.round, err = strconv.Atoi(record[5]); err != nil {
			return nil, err
		}
		if row.measure == setting {
			row.text = record[6]
		} else if row.value, err = strconv.ParseFloat(record[6], 64); err != nil {
			return nil, err
		}
		r.rows = append(r.rows, row)
	}
	return r, nil
}
