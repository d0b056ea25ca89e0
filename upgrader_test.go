//go:build unix

package tableflip_test

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"testing"

	"example.com/tableflip"
)

func init() {
	// answer serves its own PID on the listener that it inherits, once.
	roles["answer"] = func() {
		upg := must(tableflip.New(tableflip.Options{}))
		ln := must(upg.Listener("tcp", "localhost:0"))
		if err := upg.Ready(); err != nil {
			panic(err)
		}
		report("ready", upg.HasParent())
		conn := must(ln.Accept())
		must(io.WriteString(conn, "answer"))
		conn.Close()
	}
	roles["fail"] = func() { os.Exit(7) }
}

func TestUpgradeHandsListenerOver(t *testing.T) {
	upg, s := newParent(t, tableflip.Options{}, "answer")
	ln, err := upg.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ready(t, upg)
	if err := upg.Upgrade(); err != nil {
		t.Fatal(err)
	}
	<-upg.Exit()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "answer" {
		t.Errorf("the child answered %q, %v", got, err)
	}
	if m := s.await("ready"); m.text != "true" {
		t.Errorf("HasParent in the child: %s", m.text)
	}
	s.awaitEnd()
}

func TestUpgradeFailsWithExitError(t *testing.T) {
	upg, _ := newParent(t, tableflip.Options{}, "fail")
	ready(t, upg)
	var exit *exec.ExitError
	if err := upg.Upgrade(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("got %v, want exit status 7", err)
	}
}
