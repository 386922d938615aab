package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"banger/internal/vmm"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}` + "\n"

// testMonitor connects a monitor to a server the test plays.
func testMonitor(t *testing.T, onEvent func(qmpEvent), server func(net.Conn, *bufio.Reader)) *monitor {
	t.Helper()
	ours, theirs := net.Pipe()
	m := newMonitor(ours, onEvent)
	go m.read()
	served := make(chan struct{})
	go func() { defer close(served); server(theirs, bufio.NewReader(theirs)) }()
	t.Cleanup(func() {
		ours.Close()
		theirs.Close()
		<-m.ended
		<-served
	})
	return m
}

// answer reads one command and answers with what the text makes of its id.
func answer(conn net.Conn, r *bufio.Reader, text string) {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return
	}
	var c struct{ ID uint64 }
	if err := json.Unmarshal(line, &c); err != nil {
		panic(err)
	}
	fmt.Fprintf(conn, strings.ReplaceAll(text, "ID", "%[1]d"), c.ID)
}

// A greeting that has come before anybody waits for it is not lost.
func TestMonitorGreetedEarly(t *testing.T) {
	m := testMonitor(t, func(qmpEvent) {}, func(c net.Conn, r *bufio.Reader) {
		io.WriteString(c, greeting)
		answer(c, r, `{"return": {}, "id": ID}`+"\n")
	})
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		m.mu.Lock()
		waits := len(m.wait)
		m.mu.Unlock()
		if waits == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no greeting")
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := m.negotiate(ctx); err != nil || m.version != "7.2.22" {
		t.Errorf("version %q, %v", m.version, err)
	}
}

func TestMonitor(t *testing.T) {
	events := make(chan qmpEvent, 1)
	m := testMonitor(t, func(e qmpEvent) { events <- e }, func(c net.Conn, r *bufio.Reader) {
		io.WriteString(c, greeting)
		answer(c, r, `{"return": {}, "id": ID}`+"\n")
		io.WriteString(c, `{"timestamp": {"seconds": 7, "microseconds": 9}, "event": "STOP"}`+"\n")
		answer(c, r, `{"id": 999, "return": {}}`+"\n"+`{"return": {"status": "running"}, "id": ID}`+"\n")
		answer(c, r, `{"id": ID, "error": {"class": "GenericError", "desc": "no\u001b[31m"}}`+"\n")
		r.ReadBytes('\n') // no answer
		answer(c, r, `{"id": 4, "return": {}}`+"\n"+`{"return": {}, "id": ID}`+"\n")
		c.Close()
	})
	ctx := t.Context()
	if err := m.negotiate(ctx); err != nil || m.version != "7.2.22" {
		t.Fatalf("version %q, %v", m.version, err)
	}
	var status struct{ Status string }
	if err := m.execute(ctx, "query-status", &status); err != nil || status.Status != "running" {
		t.Errorf("%+v, %v", status, err)
	}
	if e := <-events; e.Event != "STOP" || !e.at().Equal(time.Unix(7, 9000)) {
		t.Errorf("event %+v at %v", e, e.at())
	}
	if err := m.execute(ctx, "stop", nil); err == nil || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("refused command: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := m.execute(short, "stop", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
	// The late answer to that one is not taken for this one's.
	if err := m.execute(ctx, "cont", nil); err != nil {
		t.Errorf("after a late answer: %v", err)
	}
	for range 2 {
		if err := m.execute(ctx, "cont", nil); !errors.Is(err, vmm.ErrEnded) {
			t.Errorf("after the end: %v", err)
		}
	}
	if len(m.wait) != 0 {
		t.Errorf("%d answers are still awaited", len(m.wait))
	}
}

// TestMonitorHostile lets QEMU say what it should not.
func TestMonitorHostile(t *testing.T) {
	for _, row := range []struct {
		name, text string
		ends       bool // the connection is given up at once
	}{
		{"nothing", "", false},
		{"no JSON", "hello\n", true},
		{"a list", "[]\n", true},
		{"a line within the limit", strings.Repeat(" ", maxQMPLineBytes-3) + "{}\n", false},
		{"a line at the limit", strings.Repeat(" ", maxQMPLineBytes-2) + "{}\n", true},
		{"an endless line", strings.Repeat("x", 3*maxQMPLineBytes), true},
		{"an answer first", `{"return": {}, "id": 0}` + "\n", false},
		{"answers to nothing", strings.Repeat(`{"return": {}, "id": 7}`+"\n", 1000), false},
		{"two greetings", greeting + greeting, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			m := testMonitor(t, func(qmpEvent) {}, func(c net.Conn, r *bufio.Reader) {
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				io.WriteString(c, row.text)
				io.Copy(io.Discard, r)
			})
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if err := m.negotiate(ctx); err == nil {
				t.Error("taken for a monitor")
			}
			ended := false
			select {
			case <-m.ended:
				ended = true
			case <-ctx.Done():
			}
			if ended != row.ends {
				t.Errorf("given up: %v, want %v", ended, row.ends)
			}
		})
	}
}

func FuzzMonitor(f *testing.F) {
	f.Add([]byte(greeting + `{"return": {}, "id": 1}` + "\n"))
	f.Add([]byte(`{"timestamp": {"seconds": 1}, "event": "VSERPORT_CHANGE", "data": {"open": true, "id": "agent"}}` + "\n"))
	f.Add([]byte(`{"event": "SHUTDOWN", "data": 7}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, theirs := net.Pipe()
		p := &process{reaped: make(chan struct{})}
		p.channel = newChannel(ours, p.paused)
		p.monitor = newMonitor(ours, func(e qmpEvent) {
			if e.Event != "STOP" { // asks back, which nobody answers here
				p.onEvent(e)
			}
		})
		go func() { theirs.Write(data); theirs.Close() }()
		p.monitor.read()
	})
}
