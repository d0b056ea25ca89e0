// Package httpdrain ends an http.Server without losing a request. A service
// calls it in place of Server.Shutdown when its successor has taken over, or when
// it is told to terminate:
//
//	srv := &http.Server{Handler: mux}
//	d := httpdrain.New(srv)
//	go d.Serve(ln) // or d.ServeTLS
//	…
//	<-upg.Exit() // or SIGTERM
//	d.Replaced = upg.Replaced() // the successor has the listener's queue
//	err := d.Shutdown(ctx)
//
// # Why
//
// Server.Shutdown sets a flag and closes the idle connections. A request that
// the server was reading at that moment is dropped, and one that its client was
// just sending on an idle connection meets a closed one. A client can repeat a
// GET, but neither it nor a proxy may repeat a POST of which they cannot know
// whether it was processed (RFC 9110, section 9.2.2).
//
// HTTP has a way for a server to say goodbye first: the field "Connection: close"
// of a response (RFC 9112, section 9.6), and the frame GOAWAY (RFC 9113, section
// 6.8). So a Drainer lets the server go on as if nothing had happened, except
// that it accepts no more connections and says goodbye in every response, until
// the connections are gone or silent. Only what is silent is closed by
// Server.Shutdown. See [Drainer.Shutdown] for the steps.
//
// Until then a Drainer costs some atomic operations per request, over HTTP/2 a look
// at the headers of frames, and no allocation. A drain costs the same for each
// connection however many there are: over TCP up to a quarter more processor time than
// Server.Shutdown takes to close it. BenchmarkRequest and BenchmarkDrain measure both.
//
// # What happens to each kind of connection
//
//	waiting in the listener's      accepted and served; with Drainer.Replaced left to
//	queue                          the process that accepts from the same socket
//	new, without a request; TLS    served, if it is not silent for IdleGrace
//	handshake in progress
//	idle (keep-alive)              the next request is served; closed after IdleGrace
//	                               without one
//	header or body arriving        served; IdleGrace begins anew with what arrives,
//	slowly                         where the kernel counts that (TCP on Linux).
//	                               Elsewhere a header has IdleGrace to be complete
//	response still being sent      IdleGrace begins anew with what is sent, where the
//	by the kernel, over a slow     kernel tells that (TCP on Linux)
//	link
//	request in its handler         served. Its response says nothing, because net/http
//	                               may have sent its header; the next one on the
//	                               connection does
//	Expect: 100-continue           gets its 100 response, and is served
//	pipelined requests             the next one is served. Those behind it are not
//	                               processed, which the client learns from its
//	                               response, and may repeat (RFC 9112, section 9.3.2).
//	                               The socket is kept open for as long as a client
//	                               goes on sending, 30 seconds at most, because a
//	                               reset would overtake the response
//	streaming response,            goes on to its end, which is the application's to
//	server-sent events             bring about: see Drainer.Context
//	hijacked (WebSocket)           not touched; waited for with Drainer.WaitHijacked,
//	                               and counted: see Drainer.Context. A request to
//	                               switch protocols is granted during the drain, too
//	HTTP/2, over TLS and h2c       told by a GOAWAY that refuses nothing; every stream
//	                               is served to its end. That comes 15 ms after the
//	                               drain has begun. Until then responses are held,
//	                               unless the request is older than 40 ms, or half of
//	                               Server.WriteTimeout, or came before the drain
//	HTTP/2, silent                 told as well. If the client acknowledges that, but
//	                               does not close, it is closed after a second, else
//	                               after IdleGrace; by net/http's GOAWAY, and a second
//	                               later. The socket is kept open as with pipelined
//	                               requests, because clients acknowledge what they read
//
// Handlers are given the server's own ResponseWriter (but see below). A response of
// HTTP/1 ends with a half-closed connection that net/http closes half a second later
// (RFC 9112, section 9.6), so that a drain takes at least that long if a request
// comes, and a second longer if the client does not close.
//
// # Contexts
//
// Requests have the context that Server.BaseContext returns. A program that cancels
// it when the drain begins (at upg.Exit, say) makes the requests of kept connections
// fail that the drain would serve. Long-lived handlers watch [Drainer.Context]
// instead, which is not the parent of any request's context.
//
// # Many clients
//
// Clients that are told to leave in the same moment reconnect in the same moment.
// Drainer.Spread spreads that over a time, as HAProxy's close-spread-time does. On
// two busy processors, of 9,900 clients that were closed at once half had reconnected
// after 8 seconds, because the listener's queue (4,096) overflowed and the kernel
// retries slowly. With a Spread of 5 seconds each took 0.05 seconds in the median and
// 0.54 in the 99th percentile, and the drain of the old process 25% more processor
// time.
//
// # HTTP/2
//
// net/http's GOAWAY refuses the streams that the server has not read. A client loses
// those whose body it cannot send again. By RFC 9113, section 6.8, a server may first send
// a GOAWAY that refuses nothing. The Drainer puts it between the frames of the server. So
// it has to be where frames can be seen: serve TLS by ServeTLS, and do not wrap the
// connections of a listener with UnencryptedHTTP2. Elsewhere, and if the program has its
// own Server.TLSNextProto, which golang.org/x/net/http2 sets, HTTP/2 clients get only
// net/http's GOAWAY, and the handlers' ResponseWriter is wrapped in one with the same
// methods.
//
// net/http's GOAWAY also tells a client that still opens streams a second after it
// has acknowledged the first, or IdleGrace after it should have.
//
// Where frames can be seen, the server serves a connection that wraps the one
// which was accepted: with Go 1.27 over TLS, and without TLS if Server.Protocols
// has UnencryptedHTTP2. Hooks are given the accepted connection as ever, but
// Hijack returns the other, whose method NetConn returns the accepted one.
//
// # What remains
//
// A client of HTTP/2 that reads nothing for longer than IdleGrace, and for two seconds
// more, may lose responses that its kernel has not received.
//
// A client that is silent for longer than IdleGrace, and then sends a request in
// the very moment in which the connection is closed, loses it. HTTP/1 has no
// remedy: RFC 9112, section 9.5, requires clients to expect it. Make IdleGrace
// longer than the pauses of the clients that matter.
//
// An HTTP/2 client may fail a request that has been given a connection and has not
// been sent when any GOAWAY arrives. net/http's does if it cannot rewind the body,
// although it has sent nothing of the request and the GOAWAY refuses no stream, so that
// no order of frames prevents it. grpc-go's sends it on another connection. nghttp2's
// h2load sends nothing after a GOAWAY, does not connect again, and counts what it was to
// send as failed. Such requests follow responses, so the Drainer holds responses for 15
// ms before the GOAWAY. On two busy processors, 160 drains of 36 such clients of
// net/http failed 45 requests without the hold, 21 if MAX_CONCURRENT_STREAMS was lowered
// instead, and 2 with it. A client that starts requests without regard to its responses,
// or gets no processor for longer, may still lose one.
//
// If there is no successor on the same socket, connections that arrive when the
// listener is closed are reset or refused. Have the load balancer stop first:
// Kubernetes removes a pod's endpoint when it sends SIGTERM, but what it has told
// of that needs a moment, for which services wait before they call Shutdown.
//
// Connections that golang.org/x/net/http2/h2c serves are hijacked connections to a
// Drainer. Drainer.WaitHijacked waits for them. A http2.Server that
// http2.ConfigureServer knows tells them to leave when Shutdown comes to its last step.
//
// The Drainer waits for connections with other protocols of Server.TLSNextProto as
// Server.Shutdown does.
package httpdrain
