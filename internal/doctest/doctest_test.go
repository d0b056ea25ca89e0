// Package doctest_test checks what the Markdown files of the repository say, as far as
// a program can: that links lead somewhere, that programs compile, and that lists that
// repeat something are complete.
package doctest_test

import (
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode"
)

const root = "../.."

// find returns the files of the repository that match, by their path from its root.
func find(t *testing.T, match func(path string) bool) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		path, err = filepath.Rel(root, path)
		if entry.IsDir() && entry.Name() == ".git" {
			return fs.SkipDir
		}
		if !entry.IsDir() && match(path) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// A page is a Markdown file.
type page struct {
	path   string
	prose  string // without what is code
	blocks []block
}

// A block is code between fences.
type block struct{ language, text string }

var (
	fenced   = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$")
	indented = regexp.MustCompile(`(?m)^(    |\t).*$`)
	span     = regexp.MustCompile("`[^`\n]*`")
	link     = regexp.MustCompile(`\]\(([^()\s]*)\)`)
	heading  = regexp.MustCompile(`(?m)^#{1,6} +(.*?)[ #]*$`)
)

func readPages(t *testing.T) map[string]page {
	t.Helper()
	pages := map[string]page{}
	for _, path := range find(t, func(path string) bool { return filepath.Ext(path) == ".md" }) {
		p := page{path: path, prose: read(t, path)}
		for _, match := range fenced.FindAllStringSubmatch(p.prose, -1) {
			p.blocks = append(p.blocks, block{match[1], match[2]})
		}
		p.prose = indented.ReplaceAllString(fenced.ReplaceAllString(p.prose, ""), "")
		pages[path] = p
	}
	if len(pages) == 0 {
		t.Fatal("found no Markdown file")
	}
	return pages
}

// anchors returns what GitHub calls the headings: lower case, spaces become hyphens,
// punctuation is dropped, and the second of a name gets -1.
func (p page) anchors() []string {
	var anchors []string
	seen := map[string]int{}
	for _, match := range heading.FindAllStringSubmatch(p.prose, -1) {
		text := link.ReplaceAllString(match[1], "]")
		anchor := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsNumber(r):
				return unicode.ToLower(r)
			default:
				return -1
			}
		}, text)
		if n := seen[anchor]; n > 0 {
			anchors = append(anchors, anchor+"-"+strconv.Itoa(n))
		} else {
			anchors = append(anchors, anchor)
		}
		seen[anchor]++
	}
	return anchors
}

// problem says what is wrong with a link on p, or nothing.
func (p page) problem(target string, pages map[string]page) string {
	u, err := url.Parse(target)
	switch {
	case err != nil:
		return err.Error()
	case u.Scheme == "https" && u.Host != "":
		return "" // nobody asks the network
	case u.Scheme != "" || u.Host != "" || strings.HasPrefix(u.Path, "/"):
		return "neither https nor relative"
	}
	path := p.path
	if u.Path != "" {
		path = filepath.Join(filepath.Dir(p.path), filepath.FromSlash(u.Path))
	}
	if _, err := os.Stat(filepath.Join(root, path)); err != nil {
		return err.Error()
	}
	if u.Fragment != "" && !slices.Contains(pages[path].anchors(), u.Fragment) {
		return "no such heading"
	}
	return ""
}

func TestLinks(t *testing.T) {
	pages := readPages(t)
	links := 0
	for _, p := range pages {
		for _, match := range link.FindAllStringSubmatch(span.ReplaceAllString(p.prose, ""), -1) {
			links++
			if problem := p.problem(match[1], pages); problem != "" {
				t.Errorf("%s: link to %q: %s", p.path, match[1], problem)
			}
		}
	}
	if links == 0 {
		t.Error("found no link")
	}
}

func TestAnchors(t *testing.T) {
	p := page{prose: "# One\n## Two words, `code_span` and [a link](there.md)\n## One\n## One\n"}
	want := []string{"one", "two-words-code_span-and-a-link", "one-1", "one-2"}
	if got := p.anchors(); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestLinkProblems(t *testing.T) {
	here := page{path: "README.md", prose: "# There"}
	pages := map[string]page{here.path: here}
	for _, good := range []string{"https://example.com/page#part", "README.md", "README.md#there", "#there", "internal/doctest"} {
		if problem := here.problem(good, pages); problem != "" {
			t.Errorf("%s: %s", good, problem)
		}
	}
	for _, bad := range []string{
		"http://example.com", "https:///page", "https://example.com/%z", "/README.md",
		"nowhere.md", "README.md#nowhere", "#nowhere", "internal/doctest#there",
	} {
		if here.problem(bad, pages) == "" {
			t.Errorf("%s: no problem", bad)
		}
	}
}

// TestPrograms builds every program that a page shows.
func TestPrograms(t *testing.T) {
	programs := 0
	for _, p := range readPages(t) {
		for _, b := range p.blocks {
			if b.language != "go" || !strings.HasPrefix(b.text, "package main\n") {
				continue
			}
			programs++
			dir := t.TempDir()
			file := filepath.Join(dir, "main.go")
			if err := os.WriteFile(file, []byte(b.text), 0o644); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "program"), file)
			cmd.Dir = root
			if output, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", p.path, err, output)
			}
		}
	}
	if programs == 0 {
		t.Error("found no program")
	}
}

// TestUnit compares the unit that the README shows with the file that it links.
func TestUnit(t *testing.T) {
	const file = "examples/deploy/systemd/notify.service"
	unit := strings.Split(read(t, file), "\n")
	blocks := 0
	for _, b := range readPages(t)["README.md"].blocks {
		if b.language != "ini" {
			continue
		}
		blocks++
		for line := range strings.Lines(b.text) {
			if !slices.Contains(unit, strings.TrimSpace(line)) {
				t.Errorf("%s lacks %q, which the README shows", file, line)
			}
		}
	}
	if blocks == 0 {
		t.Error("found no unit")
	}
}

// TestDependabotKnowsModules compares its list with the repository.
func TestDependabotKnowsModules(t *testing.T) {
	var want []string
	for _, path := range find(t, func(path string) bool { return filepath.Base(path) == "go.mod" }) {
		dir := filepath.ToSlash(filepath.Dir(path))
		if dir == "." {
			dir = ""
		}
		want = append(want, "/"+dir)
	}
	var got []string
	for line := range strings.Lines(read(t, ".github/dependabot.yml")) {
		if dir, ok := strings.CutPrefix(strings.TrimSpace(line), "- /"); ok {
			got = append(got, "/"+dir)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("dependabot.yml lists %q, want %q", got, want)
	}
}

// TestRecipes checks that the table of recipes has each of them.
func TestRecipes(t *testing.T) {
	const dir = "examples/deploy"
	table := readPages(t)[filepath.Join(dir, "README.md")].prose
	for _, path := range find(t, func(path string) bool { return strings.HasPrefix(path, dir+string(filepath.Separator)) }) {
		name, err := filepath.Rel(dir, path)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Ext(name) == ".go" || name == "README.md" {
			continue
		}
		if !strings.Contains(table, "("+filepath.ToSlash(name)+")") {
			t.Errorf("%s/README.md does not link %s", dir, name)
		}
	}
}
