package testing_test

import (
	"fmt"
	"io"
	"net"
	"net/http"

	"example.com/tableflip"
	stub "example.com/tableflip/testing"
)

// Upgrader is what serve needs. The real one and the stub both implement it.
type Upgrader interface {
	Listen(network, addr string) (net.Listener, error)
	Ready() error
	Exit() <-chan struct{}
}

var (
	_ Upgrader = (*tableflip.Upgrader)(nil)
	_ Upgrader = (*stub.Upgrader)(nil)
)

// serve is the application under test. It tells its address on serving.
func serve(upg Upgrader, serving chan<- string) error {
	ln, err := upg.Listen("tcp", "localhost:0")
	if err != nil {
		return err
	}
	defer ln.Close()
	if err := upg.Ready(); err != nil {
		return err
	}
	go http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "hello")
	}))
	serving <- ln.Addr().String()
	<-upg.Exit()
	return nil
}

func Example() {
	upg, err := stub.New()
	if err != nil {
		fmt.Println(err)
		return
	}
	serving, ended := make(chan string), make(chan error)
	go func() { ended <- serve(upg, serving) }()

	response, err := http.Get("http://" + <-serving)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	fmt.Println(string(body), err)

	upg.Stop()
	fmt.Println(<-ended)
	// Output:
	// hello <nil>
	// <nil>
}
