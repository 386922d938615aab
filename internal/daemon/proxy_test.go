package daemon

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"testing"
	"time"

	"banger"
	"banger/internal/api"
	"banger/internal/usernet"
)

func TestReach(t *testing.T) {
	m := &manager{byID: map[string]*entry{}, byName: map[string]*entry{}}
	for i, name := range []string{"web", "db"} {
		e := newEntry(fmt.Sprintf("abcdef00000%d", i))
		e.rec.Name, e.net = name, i+1
		m.byID[e.id], m.byName[name] = e, e
	}
	old := newEntry("abcdef000009") // without a network
	m.byID[old.id] = old
	m.byName["half"] = newEntry("abcdef000008") // being made
	one, err := usernet.AddressesOf(1)
	if err != nil {
		t.Fatal(err)
	}
	zero, _ := usernet.AddressesOf(0)
	for host, want := range map[string]string{
		"web.banger": "web", "WEB.Banger": "web", "web.banger.": "web", "db.banger": "db",
		one.IPv4.Addr().String(): "web", one.IPv6.Addr().String(): "web", "::ffff:" + one.IPv4.Addr().String(): "web",
	} {
		if e, err := m.reach(host); err != nil || e.rec.Name != want {
			t.Errorf("%q: %+v, %v", host, e, err)
		}
	}
	for host, want := range map[string]banger.Code{
		"": banger.CodeUsage, "web": banger.CodeUsage, ".banger": banger.CodeNotFound, "banger": banger.CodeUsage, "web.banger.evil.example": banger.CodeUsage,
		"webXbanger": banger.CodeUsage, "web.banger..": banger.CodeUsage, "a.web.banger": banger.CodeNotFound, "no.banger": banger.CodeNotFound,
		"abcdef000000.banger": banger.CodeNotFound, "half.banger": banger.CodeNotFound, "\x1b.banger": banger.CodeNotFound,
		"127.0.0.1": banger.CodeUsage, "::1": banger.CodeUsage, "localhost": banger.CodeUsage, "0": banger.CodeUsage, "0x7f000001": banger.CodeUsage,
		one.Gateway4.String(): banger.CodeUsage, one.Gateway6.String(): banger.CodeUsage, one.IPv6.Addr().WithZone("eth0").String(): banger.CodeUsage,
		zero.IPv4.Addr().String(): banger.CodeUsage, "169.254.169.254": banger.CodeUsage,
	} {
		if e, err := m.reach(host); banger.CodeOf(err) != want {
			t.Errorf("%q: %+v, %v; want %s", host, e, err, want)
		}
	}
}

// The whole way but for the guest's end of it, where nobody is in these tests.
func TestProxyCall(t *testing.T) {
	w := newWorld(t, 0)
	w.create("idle", banger.Spec{})
	w.create("held", banger.Spec{})
	w.do(api.MethodStart, "held")
	w.do(api.MethodPause, "held")
	ours, theirs, err := api.Pair()
	if err != nil {
		t.Fatal(err)
	}
	f, err := api.ConnOf(theirs)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	go api.Serve(context.Background(), f, (&daemon{}).routes())
	at, over := make(chan string, 1), make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		over <- api.NewClient(ours).Call(ctx, api.MethodProxy, api.ProxyParams{Listen: "127.0.0.1:0"}, nil, &api.None{}, func(e api.Event) {
			if e.Listen != "" {
				at <- e.Listen
			}
		}, nil)
	}()
	addr := <-at
	get := func(host string) (int, string) {
		t.Helper()
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(c, "GET http://%s/ HTTP/1.1\r\nHost: x\r\n\r\n", host)
		r, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(r.Body)
		return r.StatusCode, string(body)
	}
	for host, want := range map[string]int{"example.com": 403, "127.0.0.1": 403, "none.banger": 502, "idle.banger": 503, "held.banger": 503} {
		if got, body := get(host); got != want {
			t.Errorf("%s: %d %q, want %d", host, got, body, want)
		}
	}
	// A proxy that was there before an update takes the daemon as it is.
	before := w.processes("serve")
	mine := Version
	Version = "another"
	get("idle.banger")
	Version = mine
	if after := w.processes("serve"); len(before) != 1 || !slices.Equal(before, after) {
		t.Errorf("the daemon was %v and is %v", before, after)
	}
	w.killDaemon()
	if got, body := get("idle.banger"); got != 503 {
		t.Errorf("with the next daemon: %d %q", got, body)
	}
	cancel()
	if err := <-over; err != nil {
		t.Errorf("ended: %v", err)
	}
	if c, err := net.Dial("tcp", addr); err == nil {
		c.Close()
		t.Error("it still listens")
	}
	// A port that is taken.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, theirs, err = api.Pair()
	if err != nil {
		t.Fatal(err)
	}
	if f, err = api.ConnOf(theirs); err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	go api.Serve(context.Background(), f, (&daemon{}).routes())
	err = api.NewClient(ours).Call(t.Context(), api.MethodProxy, api.ProxyParams{Listen: l.Addr().String()}, nil, &api.None{}, nil, nil)
	wantCode(t, err, banger.CodeUnavailable, "in use")
}

// What is handed over has to be TCP.
func TestDialNeedsTCP(t *testing.T) {
	w := newWorld(t, 0)
	w.create("web", banger.Spec{})
	w.do(api.MethodStart, "web")
	r, wr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer wr.Close()
	for _, files := range [][]*os.File{nil, {wr}} {
		_, err := w.callWith(t.Context(), api.MethodDial, api.DialParams{Host: "web.banger", Port: 80}, files, nil)
		if err == nil || errors.Is(err, api.ErrGone) {
			t.Errorf("%d files: %v", len(files), err)
		}
	}
}
