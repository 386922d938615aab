package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"banger"
	"banger/internal/vmm"
	"banger/internal/wire"
)

// replyTimeout bounds the answer of an agent to a request. Under emulation a
// guest that is busy booting can take seconds to be scheduled.
var replyTimeout = 30 * time.Second

// ask opens a stream to the agent, sends a request on it and reads the reply.
// The stream is the caller's to close. A refusal comes back as *wire.Error.
func (v *VM) ask(ctx context.Context, req wire.Request) (net.Conn, wire.Reply, error) {
	proc := v.process()
	if proc == nil { // its guest has just asked for a reset
		return nil, wire.Reply{}, banger.Errorf(banger.CodeConflict, "VM %s: it is starting", v.id)
	}
	return v.askOf(ctx, proc, req)
}

// askOf is ask for one VMM of the VM's.
func (v *VM) askOf(ctx context.Context, proc vmm.Process, req wire.Request) (net.Conn, wire.Reply, error) {
	var reply wire.Reply
	conn, err := proc.DialGuest(ctx, wire.AgentPort)
	if err != nil {
		return nil, reply, fmt.Errorf("agent: %w", err)
	}
	conn.SetDeadline(time.Now().Add(replyTimeout)) // before the end of ctx can set its own
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err = func() error {
		req.Version = wire.Version
		req.Token = v.token
		if err := wire.WriteMessage(conn, req); err != nil {
			return err
		}
		if err := wire.ReadMessage(conn, &reply); err != nil {
			return err
		}
		if reply.Error != nil {
			return reply.Error
		}
		if reply.Version != wire.Version {
			return fmt.Errorf("it speaks protocol version %d, not %d", reply.Version, wire.Version)
		}
		return nil
	}()
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, reply, fmt.Errorf("agent: %s: %w", req.Op, err)
	}
	conn.SetDeadline(time.Time{})
	return conn, reply, nil
}

// A Session is one command running in the guest. Send and Recv may be called
// from two goroutines at once, each from one.
type Session struct {
	v    *VM
	proc vmm.Process // in whose guest it runs
	conn net.Conn
	tty  bool
	buf  []byte
	over bool
}

// Exec starts a session. A command that is not there or cannot run is a
// *wire.Error inside a *banger.Error.
func (v *VM) Exec(ctx context.Context, exec wire.Exec) (*Session, error) {
	if s := v.State(); !accept(s, RequestExec) {
		return nil, banger.Errorf(banger.CodeConflict, "VM %s: it is %s, so it runs no commands", v.id, s)
	}
	proc := v.process()
	if proc == nil {
		return nil, banger.Errorf(banger.CodeConflict, "VM %s: it is starting, so it runs no commands", v.id)
	}
	conn, _, err := v.askOf(ctx, proc, wire.Request{Op: wire.OpExec, Exec: &exec})
	if err != nil {
		var refusal *wire.Error
		if errors.As(err, &refusal) {
			code := banger.CodeGuest
			switch refusal.Code {
			case wire.ErrNotFound:
				code = banger.CodeCommandNotFound
			case wire.ErrNotExecutable:
				code = banger.CodeCommandNotExecutable
			}
			return nil, &banger.Error{Code: code, Message: refusal.Message, Err: refusal}
		}
		return nil, err
	}
	return &Session{v: v, proc: proc, conn: conn, tty: exec.TTY != nil, buf: make([]byte, wire.MaxFrameBytes)}, nil
}

// Send passes one frame of the user's to the guest.
func (s *Session) Send(f wire.Frame) error {
	switch f.Type {
	case wire.FrameStdin, wire.FrameStdinEOF, wire.FrameResize, wire.FrameSignal:
		return wire.WriteFrame(s.conn, f.Type, f.Payload)
	}
	return fmt.Errorf("session: frame type %d does not go to a guest", f.Type)
}

// Recv returns the next frame of output, or the exit, after which it returns
// io.EOF. The payload is valid until the next call. A guest that breaks the
// protocol, or goes away, is an error.
func (s *Session) Recv() (wire.Frame, error) {
	if s.over {
		return wire.Frame{}, io.EOF
	}
	f, err := wire.ReadFrame(s.conn, s.buf)
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return f, fmt.Errorf("session: the guest went away before the command ended: %w", err)
	}
	switch {
	case f.Type == wire.FrameStdout, f.Type == wire.FrameCredit, f.Type == wire.FrameStderr && !s.tty:
		return f, nil
	case f.Type == wire.FrameExit:
		var exit wire.Exit
		if err := json.Unmarshal(f.Payload, &exit); err != nil {
			return f, fmt.Errorf("session: exit: %w", err)
		}
		if exit.Code < 0 || exit.Code > 255 {
			return f, fmt.Errorf("session: exit code %d is no exit code", exit.Code)
		}
		s.over = true
		return f, nil
	}
	return f, fmt.Errorf("session: unexpected frame type %d from the guest", f.Type)
}

// Done is closed when the VMM is gone in whose guest the session ran.
func (s *Session) Done() <-chan struct{} { return s.proc.Done() }

// EndError says how the VMM ended, once Done is closed, as the error of what
// was cut off by it.
func (s *Session) EndError() error {
	return &banger.Error{Code: banger.CodeGuest, Detail: s.v.consoleEnd(),
		Message: fmt.Sprintf("VM %s: it ended before the command did: %s", s.v.id, describe(s.proc.Exit()))}
}

// Close ends the session; a command that still runs is hung up on.
func (s *Session) Close() error { return s.conn.Close() }
