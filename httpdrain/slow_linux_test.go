package httpdrain_test

import (
	"net/http"
	"testing"
	"time"
)

// A header that takes longer than the grace is served if its pieces do not: on
// Linux the Drainer sees them arrive.
func TestDrippingHeader(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	t.Parallel()
	const grace = 2 * time.Second
	eachTransport(t, func(t *testing.T, c config, dial func(testing.TB, string) *client) {
		t.Parallel()
		c.handler, c.grace = http.HandlerFunc(hello), grace
		s := start(t, c)
		fresh, used := dial(t, s.addr), dial(t, s.addr)
		used.get("/").more(t, "hello")
		begin := time.Now()
		result := s.drain(t.Context())
		request := get("/")
		for drip := time.Tick(grace / 4); time.Since(begin) < 2*grace; <-drip {
			fresh.send(request[:1])
			used.send(request[:1])
			request = request[1:]
		}
		for _, c := range []*client{fresh, used} {
			c.send(request)
			c.answer().last(t, "hello")
		}
		s.finished(result)
	})
}
