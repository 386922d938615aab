package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
)

// DialVM connects to a port of a VM, through the daemon and the VM's
// supervisor. What is wrong with the request is as DialParams has it. Who dials
// may have been there before the last update: a daemon of any release will do.
func DialVM(ctx context.Context, p DialParams) (*net.TCPConn, error) {
	for retried := false; ; retried = true {
		ours, err := dialVM(ctx, p)
		if err == nil || retried || !errors.Is(err, ErrGone) || ctx.Err() != nil {
			return ours, err
		}
		// The daemon was about to go, and the next one is asked.
	}
}

func dialVM(ctx context.Context, p DialParams) (*net.TCPConn, error) {
	c, err := Connect("")
	if err != nil {
		return nil, err
	}
	ours, theirs, err := tcpPair(ctx)
	if err != nil {
		c.conn.Close()
		return nil, err
	}
	defer theirs.Close()
	f, err := theirs.File()
	if err != nil {
		c.conn.Close()
		ours.Close()
		return nil, fmt.Errorf("socket: %w", err)
	}
	defer f.Close()
	if err := c.Call(ctx, MethodDial, p, []*os.File{f}, &None{}, nil, nil); err != nil {
		ours.Close()
		return nil, err
	}
	return ours, nil
}

// tcpPair makes a connection on the loopback. Other than with a socketpair,
// either end can close one direction and the other learns of a reset.
func tcpPair(ctx context.Context) (a, b *net.TCPConn, err error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, nil, fmt.Errorf("socket: %w", err)
	}
	defer l.Close()
	c, err := new(net.Dialer).DialContext(ctx, "tcp4", l.Addr().String())
	if err != nil {
		return nil, nil, fmt.Errorf("socket: %w", err)
	}
	a = c.(*net.TCPConn)
	for {
		d, err := l.Accept()
		if err != nil {
			a.Close()
			return nil, nil, fmt.Errorf("socket: %w", err)
		}
		// Another program may have guessed the port and be first.
		if d.RemoteAddr().String() == a.LocalAddr().String() {
			return a, d.(*net.TCPConn), nil
		}
		d.Close()
	}
}
