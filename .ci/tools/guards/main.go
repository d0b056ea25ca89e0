// Command guards takes each guard of a package out, one at a time, and reports those
// of which no test notices anything: conditions and their operands, bounds, cases,
// statements (close, wait, reset), and the errors of a clean-up.
//
//	go -C .ci/tools run ./guards [-run REGEXP] [-part 1/4] [-parallel N] [-tests DIR,…] [-only REGEXP] PACKAGE…
//
// PACKAGE is a directory below the root of the module, or "." for it. The file
// survivors.txt holds what is known to survive, and why; the command fails if that is
// not what it has seen. It writes all mutants of a package into one test binary, learns
// which test reaches which, and runs for each mutant only those. A run that takes too
// long has noticed. The figure is how many mutants, not how good they are: a mutant
// that a test's flicker has killed counts as killed.
//
// It needs root and unshare(1), because it runs each test in a PID namespace. Outside of
// one, a mutant that takes every process for its own kills all processes of the machine.
package main

import (
	"bytes"
	"cmp"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

//go:embed survivors.txt
var survivors string

// A seen says whose tests see the guards of packages.
type seen struct{ packages, by string }

var beside = []seen{
	{`^internal/trial$`, "service,control,httpdrain,internal/handovertest"},
	{`^internal/descriptor$`, "%s,internal/registry,.,internal/handovertest"},
	{`^internal/`, "%s,.,internal/handovertest"},
	{`^\.$`, "%s,internal/handovertest"},
	{`^httpdrain$`, "%s,service"},
	{`^supervise$`, "%s,cmd/tableflip-supervise"},
	{``, "%s"},
}

// selection is patched in a test binary: the number of a mutant, or the path of a file
// in which the bytes of those that are reached become 1.
var selection = "guards:" + strings.Repeat(".", 100)

const maxMutants = 1 << 14

// helper becomes a file of the package. It imports syscall alone, as some packages
// must, and needs nothing once it is initialised: a test may use all descriptors up.
const helper = `package %s

import "syscall"

var (
	mutantSelection              = %q
	mutantSelected, mutantsReached = mutantInit()
)

func mutantInit() (selected int, reached []byte) {
	text := mutantSelection[len("guards:"):]
	end := 0
	for end < len(text) && text[end] != '.' {
		selected = 10*selected + int(text[end]-'0')
		end++
	}
	if end == 0 || text[0] != '/' {
		return selected, nil
	}
	if fd, err := syscall.Open(text[:end], syscall.O_RDWR|syscall.O_CLOEXEC, 0); err == nil {
		reached, _ = syscall.Mmap(fd, 0, %d, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
		syscall.Close(fd)
	}
	return -1, reached
}

func mutant(n int) bool {
	if mutantsReached != nil {
		mutantsReached[n] = 1
	}
	return n == mutantSelected
}

// The check makes a difference only where it holds, or where it does not.
func mutantNever(n int, holds bool) bool { return holds && !mutant(n) }

func mutantAlways(n int, holds bool) bool { return holds || mutant(n) }

func mutantUnless(dropped bool, f func() error) error {
	if dropped {
		return nil
	}
	return f()
}
`

type test struct {
	binary  *binary
	name    string
	took    time.Duration
	reaches []byte // 1 for each mutant
}

// A binary holds the tests of one package, and all mutants of another.
type binary struct {
	dir, pkg string
	content  []byte
}

func must[T any](value T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	return value
}

func main() {
	run := flag.String("run", "", "only the functions that match")
	part := flag.String("part", "1/1", "only a part of the mutants, evenly spread")
	parallel := flag.Int("parallel", 1, "how many tests or mutants at a time, because most tests wait")
	tests := flag.String("tests", "", "only the tests of these packages")
	only := flag.String("only", "", "only the tests that match, because to learn what each reaches takes minutes")
	flag.Parse()
	if *tests != "" {
		beside = []seen{{".", *tests}}
	}
	root := must(filepath.Abs("../.."))
	must(0, os.Chdir(root))
	status := 0
	for _, pkg := range flag.Args() {
		if !check(root, filepath.Clean(pkg), regexp.MustCompile(*run), regexp.MustCompile(*only), *part, *parallel) {
			status = 1
		}
	}
	os.Exit(status)
}

// check reports whether those survive that are listed.
func check(root, pkg string, run, only *regexp.Regexp, part string, parallel int) bool {
	tmp := must(os.MkdirTemp("", "guards"))
	defer os.RemoveAll(tmp)
	must(0, os.Chmod(tmp, 0o777)) // some tests start processes of other users
	var m mutator
	tests := record(tmp, build(&m, root, pkg, tmp), only, parallel)

	known := map[string]bool{}
	for line := range strings.Lines(survivors) {
		if f := strings.Split(line, "\t"); len(f) == 4 && filepath.Dir(f[0]) == pkg {
			known[strings.Join(f[:3], "\t")] = true
		}
	}
	var k, n, tried, killed, listed int
	must(fmt.Sscanf(part, "%d/%d", &k, &n))
	type outcome struct {
		by      string
		reached int
	}
	outcomes, slots := make([]chan outcome, len(m.mutants)), make(chan struct{}, parallel)
	for i, mutant := range m.mutants {
		if i%n != k-1 || !run.MatchString(mutant.function) {
			delete(known, mutant.String())
			continue
		}
		outcomes[i] = make(chan outcome, 1)
	}
	go func() {
		for i, of := range outcomes {
			if of == nil {
				continue
			}
			slots <- struct{}{}
			go func() {
				by, reached := try(tmp, i+1, tests)
				<-slots
				of <- outcome{by, reached}
			}()
		}
	}()
	for i, mutant := range m.mutants {
		if outcomes[i] == nil {
			continue
		}
		name, o := mutant.String(), <-outcomes[i]
		by, reached := o.by, o.reached
		tried++
		switch {
		case by != "":
			killed++
			fmt.Printf("killed\t%s\t%s\n", name, by)
		case known[name]:
			listed++
			delete(known, name)
		default:
			fmt.Printf("SURVIVED\t%s\t%d tests reach it\n", name, reached)
		}
	}
	for name := range known {
		fmt.Printf("DIES OR IS GONE\t%s\n", name)
	}
	fmt.Printf("%s: of %d mutants %d die, %d survive as listed, %d survive; %d on the list do not\n",
		pkg, tried, killed, listed, tried-killed-listed, len(known))
	return tried == killed+listed && len(known) == 0
}

// build returns the binaries of the tests that see pkg.
func build(m *mutator, root, pkg, tmp string) (binaries []*binary) {
	var listed struct {
		Name    string
		GoFiles []string
	}
	must(0, json.Unmarshal(must(exec.Command("go", "list", "-json", "./"+pkg).Output()), &listed))
	overlay := map[string]string{filepath.Join(root, pkg, "mutant.go"): filepath.Join(tmp, "mutant.go")}
	must(0, os.WriteFile(filepath.Join(tmp, "mutant.go"), fmt.Appendf(nil, helper, listed.Name, selection, maxMutants), 0o666))
	for _, name := range listed.GoFiles {
		path := filepath.Join(pkg, name)
		source := must(m.mutate(path, must(os.ReadFile(path))))
		overlay[filepath.Join(root, path)] = filepath.Join(tmp, name)
		must(0, os.WriteFile(filepath.Join(tmp, name), []byte(source), 0o666))
	}
	overlayFile := filepath.Join(tmp, "overlay.json")
	must(0, os.WriteFile(overlayFile, must(json.Marshal(map[string]any{"Replace": overlay})), 0o666))

	by := beside[slices.IndexFunc(beside, func(s seen) bool { return regexp.MustCompile(s.packages).MatchString(pkg) })].by
	for tests := range strings.SplitSeq(strings.ReplaceAll(by, "%s", pkg), ",") {
		path := filepath.Join(tmp, "test")
		build := exec.Command("go", "test", "-c", "-vet=off", "-ldflags=-s -w", "-overlay", overlayFile, "-o", path, "./"+tests)
		build.Stderr = os.Stderr
		must(0, build.Run())
		if content, err := os.ReadFile(path); err == nil { // there are tests
			binaries = append(binaries, &binary{filepath.Join(root, tests), pkg, content})
			must(0, os.Remove(path))
		}
	}
	return binaries
}

// record runs each test once.
func record(tmp string, binaries []*binary, only *regexp.Regexp, parallel int) (tests []*test) {
	var mu sync.Mutex
	var all sync.WaitGroup
	slots := make(chan struct{}, parallel)
	for _, b := range binaries {
		output, _ := b.run(tmp, "", time.Minute, "-test.list=.")
		for _, name := range regexp.MustCompile(`(?m)^(Test|Example|Fuzz)\w*$`).FindAllString(output, -1) {
			if !only.MatchString(name) {
				continue
			}
			slots <- struct{}{}
			all.Go(func() {
				defer func() { <-slots }()
				t, err := b.record(tmp, name)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					fmt.Printf("FAILS WITHOUT A MUTANT\t%s\n%s\n", name, err)
				} else {
					tests = append(tests, t)
				}
			})
		}
	}
	all.Wait()
	// Those of the package itself first, then those that are quick.
	slices.SortStableFunc(tests, func(a, b *test) int {
		return cmp.Or(cmp.Compare(slices.Index(binaries, a.binary), slices.Index(binaries, b.binary)), cmp.Compare(a.took, b.took))
	})
	return tests
}

func (b *binary) record(tmp, name string) (*test, error) {
	reached := must(os.CreateTemp(tmp, "reached"))
	defer os.Remove(reached.Name())
	must(0, cmp.Or(reached.Truncate(maxMutants), reached.Chmod(0o666), reached.Close()))
	began := time.Now()
	if output, err := b.run(tmp, reached.Name(), 2*time.Minute, "-test.run=^"+name+"$"); err != nil {
		return nil, errors.New(output)
	}
	return &test{b, name, time.Since(began), must(os.ReadFile(reached.Name()))}, nil
}

// try returns the first test that fails with a mutant.
func try(tmp string, number int, tests []*test) (by string, reached int) {
	for len(tests) > 0 {
		// In one process, as long as that takes some seconds.
		b, took, names := tests[0].binary, time.Duration(0), []string(nil)
		for len(tests) > 0 && tests[0].binary == b && took < 3*time.Second {
			if tests[0].reaches[number] == 1 {
				names = append(names, tests[0].name)
				took += tests[0].took
			}
			tests = tests[1:]
		}
		if len(names) == 0 {
			continue
		}
		reached += len(names)
		output, err := b.run(tmp, fmt.Sprint(number), 30*time.Second+4*took, "-test.run=^("+strings.Join(names, "|")+")$")
		if failed := regexp.MustCompile(`--- FAIL: (\S+)`).FindStringSubmatch(output); failed != nil {
			return failed[1], reached
		} else if err != nil {
			return names[0] + ": " + err.Error(), reached
		}
	}
	return "", reached
}

func (b *binary) run(tmp, selected string, limit time.Duration, args ...string) (string, error) {
	dir := must(os.MkdirTemp(tmp, ""))
	defer os.RemoveAll(dir)
	must(0, os.Chmod(dir, 0o777))
	path := filepath.Join(dir, filepath.Base(b.dir)+".test")
	patched := bytes.Clone(b.content)
	at := bytes.Index(patched, []byte(selection)) + len("guards:")
	copy(patched[at:], selected)
	// A process that is started meanwhile would have the file open for writing, until it
	// executes unshare, and this one could not be executed.
	syscall.ForkLock.RLock()
	must(0, os.WriteFile(path, patched, 0o755))
	syscall.ForkLock.RUnlock()
	args = append(args, "-test.short", "-test.failfast", "-test.parallel=16", "-test.timeout="+limit.String())
	// In namespaces of its own: a mutant that takes every process for its own would kill
	// all that this user may. What a test leaves behind ends with them.
	cmd := exec.Command("unshare", append([]string{"--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", `"$@"; exit $?`, "sh", path}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // nor may it signal this process's group
	// In a directory of its own, because a mutant writes where it should not.
	cmd.Dir, cmd.Env = filepath.Join(dir, "package"), append(os.Environ(), "TMPDIR="+dir)
	must(0, os.Mkdir(cmd.Dir, 0o777))
	must(0, os.Chmod(cmd.Dir, 0o777))
	must(0, os.Symlink(filepath.Join(b.dir, "testdata"), filepath.Join(cmd.Dir, "testdata")))
	must(0, os.Symlink(filepath.Join(b.dir, "../examples"), filepath.Join(dir, "examples")))
	// Not a pipe, which what a test leaves behind would keep open.
	output := must(os.Create(filepath.Join(dir, "output")))
	defer output.Close()
	cmd.Stdout, cmd.Stderr = output, output
	must(0, cmd.Start())
	kill := time.AfterFunc(limit+5*time.Second, func() { _ = cmd.Process.Kill() })
	err := cmd.Wait()
	kill.Stop()
	return string(must(os.ReadFile(output.Name()))), err
}
