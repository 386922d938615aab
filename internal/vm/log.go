package vm

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"
)

// LogBytes bounds a log of a VM on the disk, of which the newest is kept: at
// least half of this much, at most all of it.
const LogBytes = 8 << 20

// oldLog is what a log's older half is called.
const oldLog = ".1"

// logPoll is how often a log that is followed is looked at.
const logPoll = 100 * time.Millisecond

// A Log is a file of bounded size: when half the limit is full it becomes the
// older half, in place of the one before, and a new one begins. Write never
// fails: a full disk loses the text and not the VM that wrote it.
type Log struct {
	mu        sync.Mutex
	path      string
	limit     int64 // of one half
	f         *os.File
	sizeBytes int64
}

// OpenLog opens a log to write at its end.
func OpenLog(path string) (*Log, error) { return openLog(path, LogBytes) }

func openLog(path string, limitBytes int64) (*Log, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Log{path: path, limit: limitBytes / 2, f: f, sizeBytes: st.Size()}, nil
}

func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for rest := p; len(rest) > 0; {
		if l.sizeBytes >= l.limit && !l.turn() {
			break
		}
		n, err := l.f.Write(rest[:min(int64(len(rest)), l.limit-l.sizeBytes)])
		l.sizeBytes += int64(n)
		rest = rest[n:]
		if err != nil {
			break
		}
	}
	return len(p), nil
}

// turn begins a new half. Where that cannot be, the log stands still.
func (l *Log) turn() bool {
	if err := os.Rename(l.path, l.path+oldLog); err != nil {
		return false
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|os.O_EXCL, 0o600)
	if err != nil {
		return false
	}
	l.f.Close()
	l.f, l.sizeBytes = f, 0
	return true
}

// Close ends the writing.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f.Close()
}

// ReadLog gives what a log holds to emit, oldest first, and then what comes
// until ctx ends or more says that nothing will; a nil more stops at the end.
// The bytes are untrusted. A log that does not exist is empty.
func ReadLog(ctx context.Context, path string, more func() bool, emit func([]byte) error) error {
	buf := make([]byte, 32<<10)
	drain := func(f *os.File) error {
		for {
			n, err := f.Read(buf)
			if n > 0 {
				if err := emit(buf[:n]); err != nil {
					return err
				}
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}
	open := func(path string) (*os.File, error) {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return f, err
	}
	// The newer half is opened first: a turn between the two openings then
	// shows the same file twice, which is seen, and loses nothing.
	current, err := open(path)
	if err != nil {
		return err
	}
	defer func() { current.Close() }() // nil is fine
	old, err := open(path + oldLog)
	if err != nil {
		return err
	}
	if old != nil {
		defer old.Close()
		if current == nil || !sameFile(old, current) {
			if err := drain(old); err != nil {
				return err
			}
		}
	}
	for {
		last := more == nil || !more() // asked before the read: what it waited for is in the log by then
		if current != nil {
			if err := drain(current); err != nil {
				return err
			}
		}
		// The log has turned, or has begun: go on with the new file.
		now, err := open(path)
		if err != nil {
			return err
		}
		if now != nil && (current == nil || !sameFile(now, current)) {
			if current != nil {
				err = drain(current)
			}
			current.Close()
			current = now
			if err != nil {
				return err
			}
			continue
		}
		now.Close()
		if last {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(logPoll):
		}
	}
}

func sameFile(a, b *os.File) bool {
	x, errX := a.Stat()
	y, errY := b.Stat()
	return errX == nil && errY == nil && os.SameFile(x, y)
}
