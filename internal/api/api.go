// Package api is the conversation between the command line and the daemon:
// its transport, its methods and their types, and the client. One connection
// is one call: a request with open files, then frames both ways, then a result
// or an error. The daemon never opens a path that the user wrote; the client
// opens it and passes the file.
package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"banger"
	"banger/internal/wire"
)

// Frame types of the API, beside those of a session, which are wire's.
const (
	frameEvent  wire.FrameType = 64 // daemon to client: Event as JSON
	frameResult wire.FrameType = 65 // daemon to client: a piece of the result's JSON
	frameDone   wire.FrameType = 66 // daemon to client: the result is whole; last
	frameError  wire.FrameType = 67 // daemon to client: banger.Error as JSON; last
	frameCancel wire.FrameType = 68 // client to daemon: end the call and say how it ended
)

const (
	maxResultBytes = 64 << 20
	maxFiles       = 4
)

// A request is the first message of a call. Files come along as SCM_RIGHTS
// with its first byte.
type request struct {
	Method string          `json:"method"`
	Params json.RawMessage `json:"params,omitempty"`
	Files  int             `json:"files,omitempty"`
}

// An Event tells of a call that goes on. One field is set.
type Event struct {
	Progress *Progress  `json:"progress,omitempty"`
	Stage    *Stage     `json:"stage,omitempty"`
	Notice   string     `json:"notice,omitempty"`  // one line for the user
	Started  bool       `json:"started,omitempty"` // the session runs: input and signals reach it
	Listen   string     `json:"listen,omitempty"`  // of a proxy: it takes connections at this address
	VM       *banger.VM `json:"vm,omitempty"`      // of a run: it is up, and its supervisor serves the connection that came with the call
}

// Progress is how far a long step is.
type Progress struct {
	Step       string `json:"step"`    // resolve, fetch, build, ...
	Subject    string `json:"subject"` // untrusted text
	DoneBytes  int64  `json:"done_bytes"`
	TotalBytes int64  `json:"total_bytes,omitempty"` // 0: not known
}

// Stage is one bar of the waterfall: a step that took from Start to End,
// in microseconds since the call began.
type Stage struct {
	Name    string `json:"name"`
	StartUs int64  `json:"start_us"`
	EndUs   int64  `json:"end_us"`
}

// writer serialises the frames of one side.
type writer struct {
	mu sync.Mutex
	w  io.Writer
}

func (w *writer) frame(t wire.FrameType, payload []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return wire.WriteFrame(w.w, t, payload)
}

func (w *writer) json(t wire.FrameType, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return w.frame(t, data)
}

// writeRequest sends the request with its files.
func writeRequest(conn *net.UnixConn, req request, files []*os.File) error {
	if len(files) > maxFiles {
		return fmt.Errorf("request: %d files, the limit is %d", len(files), maxFiles)
	}
	req.Files = len(files)
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		// One byte of its own carries the files, so that what follows can be
		// read as an ordinary stream.
		_, _, err := conn.WriteMsgUnix([]byte{byte(len(files))}, unix.UnixRights(fds...), nil)
		runtime.KeepAlive(files) // a file that is collected before it is sent is closed
		if err != nil {
			return err
		}
	} else if _, err := conn.Write([]byte{0}); err != nil {
		return err
	}
	return wire.WriteMessage(conn, req)
}

// readRequest reads the request and takes over its files.
func readRequest(conn *net.UnixConn) (req request, files []*os.File, err error) {
	var first [1]byte
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, flags, _, err := conn.ReadMsgUnix(first[:], oob)
	if err != nil {
		return req, nil, err
	}
	if n == 0 {
		return req, nil, io.EOF
	}
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return req, nil, fmt.Errorf("request: %w", err)
	}
	for _, m := range messages {
		fds, rightsErr := unix.ParseUnixRights(&m)
		if rightsErr != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "file of the client"))
		}
	}
	if flags&unix.MSG_CTRUNC != 0 || len(files) != int(first[0]) {
		return req, files, fmt.Errorf("request: %d files announced, %d arrived", first[0], len(files))
	}
	if err := wire.ReadMessage(conn, &req); err != nil {
		return req, files, err
	}
	if req.Files != len(files) {
		return req, files, fmt.Errorf("request: %d files described, %d arrived", req.Files, len(files))
	}
	return req, files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// asError makes the error that goes over the socket. What no room gave a code
// is looked at for the few causes that every user meets.
func asError(err error) *banger.Error {
	var e *banger.Error
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return banger.Errorf(banger.CodeNoSpace, "%w", err).WithHint("free some space on that file system and try again; nothing half made was kept")
	case errors.As(err, &e):
		// What was wrapped around it is part of what the user needs to know.
		if text := err.Error(); text != e.Message {
			c := *e
			c.Message = text
			e = &c
		}
		return e
	}
	return banger.Errorf(banger.CodeInternal, "%w", err)
}

// encodeError makes the payload of a frameError. Texts from outside may be
// longer than a frame; the longest is cut until all fit.
func encodeError(e *banger.Error) []byte {
	c := *e
	for {
		data, err := json.Marshal(&c)
		if err == nil && len(data) <= wire.MaxFrameBytes {
			return data
		}
		longest := &c.Message
		for _, text := range []*string{&c.Hint, &c.Detail} {
			if len(*text) > len(*longest) {
				longest = text
			}
		}
		*longest = (*longest)[:len(*longest)/2]
	}
}
