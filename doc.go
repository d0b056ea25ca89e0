// Package tableflip restarts a network service without losing a request. It starts the
// service's new binary, passes every listener on to it, waits until the new process is
// ready, and then tells the old one to drain and exit.
//
// # The model
//
// Each process of the service is a generation. A generation calls [New], gets its
// listeners from [Fds.Listen], and calls [Upgrader.Ready] when it can serve. From then
// on it is in charge, and accepts. When it is told to, usually by SIGHUP, it calls
// [Upgrader.Upgrade]. When [Upgrader.Exit] is closed, it drains and exits:
//
//	upg, err := tableflip.New(tableflip.Options{PIDFile: "/run/service.pid"})
//	ln, err := upg.Listen("tcp", "localhost:8080")
//	go upgradeOnSIGHUP(upg) // and upg.Stop() on SIGTERM
//	err = upg.Ready()
//	go serve(ln)
//	<-upg.Exit()
//	// close ln, finish what has begun, return from main
//
// Package service, in this module, does all of this in one call.
//
// Upgrade starts the binary that argv[0] named at the start, with the same arguments.
// The new process, the child, inherits the listeners of this one, the parent: its
// Listen does not create a socket, but returns the same one, with all connections that
// wait in the queue. At any time at most one generation is in charge:
//
//	parent                                   child
//	Upgrade: starts the child ─────────────▶ init: takes variables, descriptors
//	                          ◀──── here ──  New
//	                                         Listen, …: claims descriptors
//	                          ◀──── ready ─  Ready
//	commits                   ─── commit ──▶ writes the PID file
//	                          ◀ acknowledged closes what nobody claimed,
//	Exit is closed, Upgrade returns          Ready returns nil
//	drains, exits             ─── EOF ─────▶ WaitForParent returns;
//	                                         Upgrade is allowed (see MaxDraining)
//
// A child that crashes, gives up, is not ready in time, or does not acknowledge the
// commit leaves its parent as it was: with its sockets, Unix socket files, PID file,
// and the flags of its descriptors. Upgrade returns an error, and the next one works.
// If instead the parent dies before it commits, the child is in charge.
//
// A child that knows why it cannot serve says so by [Upgrader.Fail], and Upgrade returns
// the reason. [Upgrader.Rehearse] tries a new version without putting it in charge.
// [Upgrader.Generations] lists the processes of the service.
//
// Either side of the handover ignores messages that it does not know, so that a binary
// can be replaced by one with a later or an earlier version of this package.
//
// # Deploys that undo themselves
//
// A new version may become ready, and crash a second later. With [Options].Trial it is put in
// charge only after it has served for a while beside its parent:
//
//	parent                                   child
//	                          ◀──── ready ─  Ready
//	                          ──── trial ─▶  Ready returns nil
//	serves, in charge                        serves, on trial
//	commits                   ─── commit ──▶ writes the PID file
//	                          ◀ acknowledged closes what nobody claimed
//	Exit is closed, Upgrade returns
//
// Until the commit, whatever happens to the child leaves the parent as it was, except for
// what both share beyond this package. A killed child loses the requests that it had begun,
// and one that lives drains. [Options].Trial says what is different on trial, and for whom a
// trial is wrong. Package service asks the child during its trial whether it is healthy.
//
// # Deploys in quick succession
//
// An upgrade is refused while the previous process drains, unless [Options].MaxDraining
// says how many may. It is for services whose connections live longer than it takes until
// the next deploy. Each generation knows all earlier ones that live. So it does not matter
// in which order they end: that of one in the middle is nothing to the others, and if the
// process in charge dies, all [Upgrader.Hurry] channels are closed.
//
// An upgrade for which there is no place has the oldest process hurry, and waits for the
// end of any. A process that is stuck keeps its place: kill it, by its PID in the error.
//
// If a process is replaced by a version of this package that does not know MaxDraining,
// the earlier ones drain to their ends, but the crash of the new one hurries only those
// that the replaced one, while it lives, can tell.
//
// # What is lost, and by whom
//
// The library itself loses no connection and no datagram: a socket's queue outlives the
// processes that have it open. What the old process has accepted is its own to finish.
// The Shutdown method of [net/http.Server] loses requests that arrive while it runs.
// Package httpdrain, in this module, does not. A UDP server should answer the datagrams
// that it has read before it exits, and read no more once Exit is closed.
//
// [Fds.AddConn] passes connections on. What a process has read from one, and has not
// used, is not passed on with it.
//
// # systemd
//
// A unit of Type=notify needs only an ExecReload= that sends SIGHUP:
//
//	[Service]
//	Type=notify
//	ExecStart=/usr/bin/service
//	ExecReload=/bin/kill -HUP $MAINPID
//
// Where there is a NOTIFY_SOCKET, the Upgrader speaks the protocol of sd_notify(3).
// Ready of the first generation sends READY=1. An upgrade begins with RELOADING=1 and
// MONOTONIC_USEC, which is what Type=notify-reload waits for. After a successful one
// the old process sends MAINPID and READY=1, and waits until systemd has read them
// (BARRIER=1). It is still the main process then, so that NotifyAccess=main suffices. A
// failed upgrade ends with READY=1 and a STATUS that says why. Stop sends STOPPING=1.
// If the manager does not read, the upgrade succeeds all the same, and [Options].Logger
// receives a warning.
//
// The first generation inherits the sockets of a .socket unit (LISTEN_FDS,
// sd_listen_fds(3)): see [Fds]. With [Options].DescriptorStore, systemd keeps copies of
// the sockets, which outlive a crash:
//
//	FileDescriptorStoreMax=16
//	Restart=always
//
// Restart=on-failure does not suffice: if the new process fails right after the commit,
// systemd may see only the successful end of the old one.
//
// If the new process dies while the old one drains, systemd starts the service again
// only when the old one has ended. The old one should therefore end soon once
// [Upgrader.Hurry] is closed, as package service does. Leave KillMode= at its default.
// With "mixed", every stop cuts the requests of a process that drains. With "process", a
// process can be left behind that holds the addresses, and that systemd neither stops nor
// restarts.
//
// With Type=simple or forking, systemd learns the new main process from a PID file. Set
// PIDFile=/run/service.pid in the unit, and the same path in [Options].PIDFile. systemd
// reads the file when the old process exits, and Ready has replaced it by then.
//
// # The log
//
// [Options].Logger receives a record of each step, whose message and attributes stay as
// they are, so that programs can depend on them. Each names a process by the attributes
// process.pid and process.generation, counted from the first one, 1. The group process
// keeps them apart from a pid that the Logger has of its own:
//
//	tableflip: started    the new process was started
//	tableflip: here       it has called New; if a wrapper started it, process.pid is now
//	                      its own
//	tableflip: ready      it has called Ready
//	tableflip: on trial   it serves beside this process or, in its own log, beside its
//	                      parent (Options.Trial)
//	tableflip: committed  it is in charge; took: how long the upgrade took
//	tableflip: failed     the upgrade failed; error, cause, took
//	tableflip: in charge  this process is; process.version and process.revision: those of
//	                      the program, as far as the go command recorded them
//	tableflip: draining   this process has been in charge, or on trial; replaced: true
//	                      after an upgrade, false after Stop, and if a trial was undone
//	tableflip: ended      another process has ended: an earlier one, or one whose trial was
//	                      undone, after it has drained (took: for how long), or the one
//	                      in charge after this process
//	tableflip: rehearsed  a rehearsal has succeeded; took
//
// Those of a rehearsal also have rehearsal: true. The cause of a failure is one of
// "stopped" (by Stop), "cancelled" (by the context), "timeout", "reason" (the new process
// said why it can't take charge), "child" (it exited, or did what it must not) and
// "parent" (this process could not start it, or could not hand over). A failure has the
// level Error, and all else is Info.
//
// # Other supervisors
//
// Containers, runit, supervisord, launchd and shells take the end of the first
// generation for the end of the service. Package supervise and the command
// tableflip-supervise, both in this module, keep a process in place for them.
//
// The directory examples/deploy has units and recipes, a page on what to expect while
// two versions of a service run, and a test to copy that asks whether a service survives
// upgrades under load.
//
// # What an upgrade applies
//
// The new process inherits what the old one has, whatever the unit or the command line
// says by now:
//
//	the binary                   the file that the path names now
//	arguments                    as this process was started with
//	environment                  as os.Environ has it now; a unit's Environment= and
//	                             EnvironmentFile= are read at a restart
//	working directory            the one that its name at the start names now
//	limits, user, capabilities,  as they are now; a unit's LimitNOFILE=, User=, … are
//	namespaces, cgroup           applied at a restart
//	listening sockets            with the options that they were created with
//
// [Options].Command can change what the new process gets, as far as this process is
// permitted to.
//
// # Moving over from github.com/cloudflare/tableflip
//
// Change the import path. All names are there, with the same meaning, and the five
// errors have the same texts. New understands the handover of v1.2.3 of that library, so
// that the first deployment is an upgrade like any other. [Options].Compat has the old
// binary understand an upgrade to it. examples/deploy/from-tableflip.md has the order of
// steps.
//
// A process with the other library knows of no acknowledgement, generation number
// or sibling. If it is the parent, it drains as soon as this process is ready. Ready then
// writes the PID file, and tells a service manager that listens (NotifyAccess=all) the new
// main process, before it says so. If it is the child, it is in charge as soon as it is
// ready, also in a rehearsal, in which it is killed then; and Hurry is closed unless it
// exits with status 0. Where the library can't know whether a process with the
// other library is its parent (outside Linux, or if the parent's binary has
// capabilities), New waits a second for the names of the descriptors. If the parent has
// not named them after 10 seconds, New returns an error.
//
// What else is different:
//
//   - A program that talks to systemd itself must stop sending MAINPID, and READY after
//     an upgrade: this package sends both from the old process, so that
//     NotifyAccess=main, the default, suffices. With NotifyAccess=main, systemd ignores a
//     child that sends MAINPID before Ready. With NotifyAccess=all, systemd follows the
//     child, and if the child then fails, ends the service and starts it again.
//     WATCHDOG=1 may be sent as before.
//   - Under systemd the new process is systemd's child: os.Getppid is not the PID of
//     its predecessor, which [Upgrader.Generations] has.
//   - A relative Options.PIDFile is relative to the directory in which the process was
//     started, whatever os.Chdir did before New.
//   - Stop removes the PID file.
//   - Methods that add or remove a descriptor wait while an upgrade is under way,
//     because the new process gets what there was when it began.
//
// # Limits
//
// Upgrades work on Linux, macOS, the BSDs, Solaris, illumos and AIX. Elsewhere the
// package compiles, and New returns ErrNotSupported; package testing has a stub
// that can take the Upgrader's place there, and in tests.
//
// A child that is killed after it has acknowledged the commit was in charge: a
// supervisor has to start the service again.
//
// The new process must keep the network namespace, or at least the descriptors, of the
// old one. It runs as the same user unless Options.Command chooses another. The names
// of the descriptors travel in the environment, which systems limit: on Linux, to about
// 2 MiB in all with the usual stack limit, enough for tens of thousands of listeners. The
// limit of open files must allow for two descriptors per listener. A new process starts
// with the soft limit that the first generation was started with, because the Go
// runtime restores it. On Linux, if the descriptors do not fit under that, the new
// process gets this process's limit, and keeps it for what it starts itself; on other
// systems raise the soft limit, or call syscall.Setrlimit, which makes Go pass it on.
//
// The next generation starts in the first one's working directory, by its name, so
// that a link such as /srv/current is followed anew. Service managers do not pass that
// name: without PWD, it is known only if the binary was started by an absolute path
// that begins with it. Otherwise set PWD for the service (Environment=PWD=/srv/current),
// start it by an absolute path, or set Dir and Path in Options.Command. Without any of
// these a relative binary is looked for where the link led at the start.
//
// If argv[0] has no slash, the binary is where PATH had it at the start. If that was
// another program, Upgrade fails and says so.
//
// # Systems
//
// The tests run on Linux. For other systems their kernels' sources and manual pages
// were read, except AIX's, whose source is not public. What differs there:
//
//	environment        at most 256 KiB on NetBSD and DragonFly, 512 KiB on OpenBSD,
//	                   1 MiB on macOS and, by default, AIX, 2 MiB on Solaris and
//	                   illumos (getconf ARG_MAX); about 30 bytes per listener
//	end of the parent  seen by its pipe alone, outside Linux: a process that C code
//	                   has forked, and that executes nothing, can delay it
//	wrappers           a service that a wrapper has started is told to leave by a
//	                   failed upgrade, and killed on Linux only
//	lost descriptors   not noticed, outside Linux, by a service that a wrapper has put
//	                   into the background: it becomes a first generation, which
//	                   usually fails because the addresses are in use
//	new binary         macOS kills one that was copied over the file of a running one,
//	                   whose signature it remembers: rename it into place
//	Unix sockets       on the BSDs and macOS a full queue refuses connections;
//	                   abstract and autobound addresses exist on Linux only
//	package supervise  not on Solaris, illumos, AIX; see there for the others
package tableflip
