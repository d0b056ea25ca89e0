#!/bin/sh
# A container whose binary is on the host, and is upgraded in place. Not run by a test,
# for want of Docker; tableflip-supervise is tested as process 1 of a PID namespace.
#
#   bind-mounted.sh start        once
#   bind-mounted.sh upgrade FILE to the new binary, which needs no shared library
set -eu

case $1 in
start)
	# The directory, never the file: a file that is mounted stays the old one when
	# another is renamed over it, and cannot be written to while it runs.
	docker run --detach --name web --publish 8080:8080 --stop-timeout 50 \
		--volume /srv/web:/srv/web:ro example.com/tableflip-supervise \
		/srv/web/server -listen :8080
	;;
upgrade)
	install -m 755 "$2" /srv/web/server.new
	mv /srv/web/server.new /srv/web/server
	docker kill --signal HUP web
	;;
esac
