#!/bin/sh
# A terminal: the supervisor stays the shell's job while the generations of web change.
# Ctrl-C stops the service, Ctrl-Z, fg and bg work, and
#
#   kill -HUP PID   upgrades to the binary that is installed now: PID is this script's
#
# Run by a test of package supervise, as it is. Both programs are found in PATH.
exec tableflip-supervise -- web "$@"
