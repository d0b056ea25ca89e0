// Package control tells whoever deploys a service whether an upgrade worked. It answers
// on a Unix socket, which is passed on from generation to generation like any other
// listener:
//
//	ctl, err := control.New(upg, "/run/web.ctl", control.Options{}) // before Ready
//	go ctl.Serve()                                                  // after Ready
//	ctl.Close()                                                     // once drained, last
//
// The command tableflip-ctl, in this module, asks there, and so does a service that
// calls [Main]. With
//
//	ExecReload=/usr/local/bin/tableflip-ctl -s /run/web.ctl upgrade
//
// in its unit, systemctl reload returns when the new process is in charge, and fails
// with the new process's own words if it can't take charge.
//
// # The protocol
//
// It is HTTP, so that nothing else is needed:
//
//	curl --unix-socket /run/web.ctl -X POST http://control/upgrade
//
// One plain sentence is for a person. With "Accept: application/json", or the parameter
// json, an object is for a machine.
//
//	POST /upgrade   answers when a new process is in charge, or says why not. Going
//	                away aborts the upgrade. With the parameter wait, it is not refused
//	                because another upgrade is under way or an earlier generation
//	                drains, but waits for that.
//	POST /rehearse  the same up to the commit: would an upgrade succeed? See
//	                Upgrader.Rehearse
//	POST /stop      has the service drain and end; answers when that has begun
//	GET /status     this process: its PID, generation, state, since when, version and
//	                VCS revision, listeners and connections; the other generations that
//	                live; the last upgrade; the counters; what an upgrade does not apply
//	GET /events     one line for each step, as long as the process lives
//
// The status codes, and the exit statuses of tableflip-ctl that follow from them:
//
//	200  0  done
//	403  1  the client is neither root nor the user of the service
//	409  3  refused for now: another upgrade is under way, an earlier generation
//	        drains, or this process was just replaced: ask again
//	500  1  failed; the answer says why, and the process serves as before
//	501  1  upgrades are not supported here
//	503  1  the service stops, or too many read events
//	     2  nobody answers at the socket
//
// The fields of JSON are those of Counters, and what the examples show. There may be
// more in later versions.
//
// # The events
//
// An event has a time, a name and attributes, which the package documentation of
// tableflip lists under "The log". Here, those of the group process stand by themselves, as
// pid, generation and so on. The first one of each stream, "watching", is about
// the process that streams. While a process drains, "draining" says how many
// connections are left, each second that their number changes.
//
// Each process streams its own events, until it ends. tableflip-ctl events follows
// all generations.
//
// # Who may ask
//
// The socket's file has mode 0600 from the start. On Linux, macOS, FreeBSD, Solaris and
// illumos the kernel also says who has connected: only root and the user of the process
// may. On other systems the mode must do.
//
// # What can't happen
//
// No upgrade fails because of the control socket, and no client can hold up a drain or
// an upgrade: at most 64 are served at once, half of them readers of events; one that
// does not read misses events; and Close waits for two seconds. If the socket's file was
// removed, nobody can ask any more until the next upgrade (by SIGHUP), which binds it
// anew.
//
// # Metrics
//
// [Server.Counters] are for whatever the program uses. This package does not import
// expvar, because that puts a handler on http.DefaultServeMux. See the example.
package control
