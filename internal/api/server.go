package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/wire"
)

// A Call is one request as its handler sees it. The files are closed when the
// handler returns.
type Call struct {
	Files []*os.File
	// Input has the session frames that the client sends. It is closed when
	// the client is gone.
	Input <-chan wire.Frame

	params json.RawMessage
	out    *writer
}

// Params decodes the parameters.
func (c *Call) Params(v any) error {
	if len(c.params) == 0 {
		return nil
	}
	if err := json.Unmarshal(c.params, v); err != nil {
		return banger.Errorf(banger.CodeUsage, "parameters: %w", err)
	}
	return nil
}

// File returns the file at an index of the call's, nil for -1.
func (c *Call) File(index int) (*os.File, error) {
	if index == -1 {
		return nil, nil
	}
	if index < 0 || index >= len(c.Files) {
		return nil, banger.Errorf(banger.CodeUsage, "parameters: no file number %d", index)
	}
	return c.Files[index], nil
}

// Emit tells the client of something. A client that is gone is not an error
// here: the call's context has ended.
func (c *Call) Emit(e Event) { c.out.json(frameEvent, e) }

// Send passes a frame of a session to the client.
func (c *Call) Send(f wire.Frame) error { return c.out.frame(f.Type, f.Payload) }

// A Handler serves one method. Its context ends when the client cancels or
// goes away.
type Handler func(ctx context.Context, c *Call) (result any, err error)

// Ready tells whoever started this process as a daemon that it takes calls, or
// why it cannot. Only the first call says anything.
func Ready(err error) {
	readyOnce.Do(func() {
		var st unix.Stat_t
		if unix.Fstat(readyFD, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
			return // started by hand or by systemd
		}
		f := os.NewFile(readyFD, "ready")
		defer f.Close()
		if err != nil {
			f.Write(encodeError(asError(err)))
		}
	})
}

var readyOnce sync.Once

// parseReady reads what Ready wrote.
func parseReady(text []byte) error {
	e := new(banger.Error)
	if err := json.Unmarshal(text, e); err != nil || e.Message == "" {
		return banger.Errorf(banger.CodeInternal, "daemon: it does not start: %q", text)
	}
	return e
}

// Serve answers the one call of a connection and closes it.
func Serve(ctx context.Context, conn *net.UnixConn, routes map[string]Handler) {
	defer conn.Close()
	// Whoever connects and says nothing does not keep the daemon from ending.
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	req, files, err := readRequest(conn)
	stop()
	if err != nil {
		return
	}
	defer closeAll(files)
	if Gone(conn) {
		return // nobody wants it any more: what was not begun is not begun
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	input := make(chan wire.Frame)
	go func() {
		defer close(input)
		cancel(readInput(ctx, conn, input))
	}()
	out := &writer{w: conn}
	handler := routes[req.Method]
	if handler == nil {
		out.frame(frameError, encodeError(banger.Errorf(banger.CodeUsage, "method %q: this daemon does not have it", req.Method)))
		return
	}
	result, err := handler(ctx, &Call{Files: files, Input: input, params: req.Params, out: out})
	if err != nil {
		e := asError(err)
		if ctx.Err() != nil && e.Code != banger.CodeCanceled {
			e = errCanceled // what broke, broke because the call was ended
		}
		out.frame(frameError, encodeError(e))
		return
	}
	data, err := json.Marshal(result)
	if err != nil {
		out.frame(frameError, encodeError(asError(err)))
		return
	}
	for len(data) > 0 {
		n := min(len(data), wire.MaxFrameBytes)
		if out.frame(frameResult, data[:n]) != nil {
			return
		}
		data = data[n:]
	}
	out.frame(frameDone, nil)
}

// errCanceled is the cause of the end of a call that the user wanted to end.
var errCanceled = &banger.Error{Code: banger.CodeCanceled, Message: "canceled"}

// readInput passes on the client's frames until it cancels, goes away, or the
// call is over.
func readInput(ctx context.Context, conn net.Conn, input chan<- wire.Frame) error {
	for {
		f, err := wire.ReadFrame(conn, nil)
		switch {
		case errors.Is(err, io.EOF):
			return errCanceled
		case err != nil:
			return banger.Errorf(banger.CodeCanceled, "client: %w", err)
		case f.Type == frameCancel:
			return errCanceled
		}
		select {
		case input <- f:
		case <-ctx.Done():
			return nil
		}
	}
}
