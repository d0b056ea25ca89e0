package registry

import (
	"net"
	"time"
)

// withKeepAlive makes a TCP listener give its connections the keep-alive parameters
// of config, if it has any, as a listener that config created does:
// net.FileListener knows nothing of them.
func withKeepAlive(ln net.Listener, config *net.ListenConfig) net.Listener {
	tcp, _ := ln.(*net.TCPListener)
	if tcp == nil || !hasKeepAlive(config) {
		return ln
	}
	return &keepAliveListener{tcp, config.KeepAlive, config.KeepAliveConfig}
}

// likeInherited gives a listener that config created, and that applies config itself,
// the type that it will have in the next generation.
func likeInherited(ln net.Listener, config *net.ListenConfig) net.Listener {
	tcp, _ := ln.(*net.TCPListener)
	if tcp == nil || !hasKeepAlive(config) {
		return ln
	}
	return &keepAliveListener{TCPListener: tcp}
}

func hasKeepAlive(config *net.ListenConfig) bool {
	return config.KeepAlive != 0 || config.KeepAliveConfig.Enable
}

type keepAliveListener struct {
	*net.TCPListener
	idle   time.Duration // with config, zero if there is nothing to do
	config net.KeepAliveConfig
}

func (ln *keepAliveListener) Accept() (net.Conn, error) {
	conn, err := ln.AcceptTCP()
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// AcceptTCP applies the parameters as net.ListenConfig documents them. Like net,
// it ignores errors: they mean that the connection is gone.
func (ln *keepAliveListener) AcceptTCP() (*net.TCPConn, error) {
	conn, err := ln.TCPListener.AcceptTCP()
	if err != nil {
		return nil, err
	}
	switch {
	case ln.config.Enable:
		conn.SetKeepAliveConfig(ln.config)
	case ln.idle < 0:
		conn.SetKeepAlive(false)
	case ln.idle > 0:
		conn.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: ln.idle})
	}
	return conn, nil
}
