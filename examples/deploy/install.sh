#!/bin/sh
# Installs a new binary in the place of a running one, upgrades the service, and says
# whether that succeeded.
#
#   install.sh NEW BINARY PIDFILE
#
# PIDFILE is Options.PIDFile of the service. Run by a test in this directory, as it is.
set -eu

# Beside the old one, and then renamed over it: a binary that runs cannot be written to
# ("text file busy"), and nobody may find half of one.
install -m 755 "$1" "$2.new"
mv "$2.new" "$2"

# The file names the new process as soon as that is in charge, and no sooner.
old=$(cat "$3")
kill -HUP "$old"
for _ in $(seq "${TIMEOUT:-70}"); do # seconds, more than Options.UpgradeTimeout
	[ "$(cat "$3")" = "$old" ] || exit 0
	sleep 1
done
echo "process $old was not replaced: its log says why" >&2
exit 1
