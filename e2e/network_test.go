package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// The network of booted guests, with a host and an Internet that the test made.
func TestNetwork(t *testing.T) {
	curl, err := programLayer("curl")
	if err != nil {
		t.Fatal(err)
	}
	prog, err := os.ReadFile(world.prog)
	if err != nil {
		t.Fatal(err)
	}
	ours, err := layerOf(file("prog", string(prog), 0o755))
	if err != nil {
		t.Fatal(err)
	}
	below, above, err := busyboxLayers()
	if err != nil {
		t.Fatal(err)
	}
	img, err := imageOf(gz, v1.Config{Entrypoint: []string{"/prog", "net", "serve", ":7000"}, Env: []string{"PATH=/bin:/usr/bin"}}, below, above, ours, curl)
	if err != nil {
		t.Fatal(err)
	}
	if err := world.registry.push("network:latest", img); err != nil {
		t.Fatal(err)
	}
	home := newStore(t)
	banger(t, home, "image", "pull", "--name", "network", world.registry.addr+"/network:latest")
	// A daemon from out here would have its network out here.
	for _, p := range processesOf(home) {
		syscall.Kill(p.pid, syscall.SIGKILL)
	}
	runInside(t, "TestNetworkInside", inside{Home: home})
}

// programLayer is a program of the host's with the libraries it needs.
func programLayer(name string) ([]byte, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("MISSING: %w", err)
	}
	out, err := exec.Command("ldd", path).Output()
	if err != nil {
		return nil, fmt.Errorf("ldd %s: %w", path, err)
	}
	entries := []entry{}
	add := func(path string) error {
		data, err := os.ReadFile(path)
		if err == nil {
			entries = append(entries, file(strings.TrimPrefix(path, "/"), string(data), 0o755))
		}
		return err
	}
	if err := add(path); err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(out)) {
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/") {
				if err := add(word); err != nil {
					return nil, err
				}
			}
		}
	}
	return layerOf(entries...)
}

func TestNetworkInside(t *testing.T) {
	in, far := setUpInside(t)
	banger := func(args ...string) string {
		t.Helper()
		return run(t, append([]string{filepath.Join(in.Bin, "banger")}, args...)...)
	}
	www := t.TempDir()
	if err := os.WriteFile(filepath.Join(www, "index.html"), []byte("from far\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	far.start("", "busybox", "httpd", "-f", "-p", farAddr+":80", "-h", www)

	banger("create", "--name", "one", "-m", "384M", "--net", "public,group:lab",
		"-p", "7001:7000", "-p", "7001:7000/udp", "-p", "8081:80", "network")
	banger("create", "--name", "two", "-m", "384M", "--net", "none,group:lab", "network")
	banger("start", "one", "two")
	guest := func(vm string, args ...string) string {
		t.Helper()
		return banger(append([]string{"exec", vm, "--"}, args...)...)
	}
	await(t, "one serves", func() bool { return strings.Contains(banger("logs", "one"), "serving") })

	t.Run("curl", func(t *testing.T) {
		if out := guest("one", "curl", "-sS", "--max-time", "20", "http://"+farName+"/"); out != "from far\n" {
			t.Errorf("out: %q", out)
		}
		guest("one", "sh", "-c", "mkdir -p /srv; echo from one > /srv/index.html; busybox httpd -p 80 -h /srv")
		if out := run(t, "curl", "-sS", "--max-time", "20", "http://127.0.0.1:8081/"); out != "from one\n" {
			t.Errorf("in: %q", out)
		}
		if out, err := try(t, filepath.Join(in.Bin, "banger"), "exec", "two", "--", "curl", "-sS", "--max-time", "20", "http://"+farName+"/"); err == nil {
			t.Errorf("a VM without a way out: %q", out)
		}
	})
	t.Run("DNS", func(t *testing.T) {
		if out := guest("one", "/prog", "net", "lookup", farName); !strings.Contains(out, farAddr) || !strings.Contains(out, farAddr6) {
			t.Errorf("%s: %q", farName, out)
		}
		if out, err := try(t, filepath.Join(in.Bin, "banger"), "exec", "one", "--", "/prog", "net", "lookup", "nowhere.test"); err == nil || !strings.Contains(out, "no such host") {
			t.Errorf("nowhere.test: %q, %v", out, err)
		}
		if out := guest("one", "/prog", "net", "lookup", "two.banger"); !strings.Contains(out, "10.87.") || !strings.Contains(out, "fd62:") {
			t.Errorf("two.banger: %q", out)
		}
	})

	t.Run("IPv6", func(t *testing.T) {
		var tr transferred
		decode(t, guest("one", "/prog", "net", "up", farNet6, "4194305", "3"), &tr)
		if tr.Bytes != 4194305 || !tr.Equal {
			t.Errorf("%+v", tr)
		}
	})
	t.Run("ping", func(t *testing.T) {
		for _, address := range []string{farAddr, farAddr6, "host.banger", "two.banger"} {
			guest("one", "busybox", "ping", "-c", "1", "-W", "10", address)
		}
	})

	// From either end: out of the guest, into it, and from guest to guest.
	ways := []struct {
		name, server string
		connect      int // connections, eight at a time
		hold         int // connections at once; a port of the host takes 1024
		client       func(args ...string) string
	}{
		{"out", farNet, 3000, 2000, func(args ...string) string { return guest("one", append([]string{"/prog", "net"}, args...)...) }},
		{"in", "127.0.0.1:7001", 1000, 1000, func(args ...string) string { return run(t, append([]string{in.Prog, "net"}, args...)...) }},
		{"between", "one.banger:7000", 500, 200, func(args ...string) string { return guest("two", append([]string{"/prog", "net"}, args...)...) }},
	}
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			for seed, way := range []string{"down", "up"} {
				var tr transferred
				decode(t, w.client(way, w.server, "33554433", fmt.Sprint(seed+1)), &tr)
				if tr.Bytes != 33554433 || !tr.Equal {
					t.Errorf("%s: %+v", way, tr)
				}
				t.Logf("%s: %.0f MB/s", way, float64(tr.Bytes)/tr.Seconds/1e6)
			}
			if out := w.client("half", w.server); !strings.Contains(out, "after the end") {
				t.Errorf("half-close: %q", out)
			}
			for _, size := range mtuEdges {
				var u struct {
					Bytes int
					Equal bool
					Tries int
				}
				decode(t, w.client("udp", w.server, fmt.Sprint(size)), &u)
				if u.Bytes != size || !u.Equal {
					t.Errorf("a datagram of %d bytes: %+v", size, u)
				}
			}
			var rate struct {
				PerSecond float64 `json:"per_second"`
			}
			decode(t, w.client("connect", w.server, fmt.Sprint(w.connect), "8"), &rate)
			t.Logf("%.0f connections a second", rate.PerSecond)
			if out := w.client("hold", w.server, fmt.Sprint(w.hold)); !strings.Contains(out, fmt.Sprintf(`"held":%d`, w.hold)) {
				t.Errorf("%d at once: %q", w.hold, out)
			}
		})
	}

	// A VM goes and comes while its peer keeps talking.
	t.Run("restart", func(t *testing.T) {
		const seconds = 20
		talk := background(t, "talking", filepath.Join(in.Bin, "banger"), "exec", "two", "--", "/prog", "net", "talk", "one.banger:7000", fmt.Sprint(seconds))
		banger("restart", "one")
		var said struct {
			Exchanged, Broken, Wrong int
			Silent                   float64 `json:"silent_seconds"`
			Last                     float64 `json:"last_seconds"`
		}
		await(t, "the peer has talked", func() bool { return strings.Contains(talk.String(), "}") })
		_, report, _ := strings.Cut(talk.String(), "talking\n")
		decode(t, report, &said)
		t.Logf("%+v", said)
		if said.Wrong > 0 || said.Broken == 0 || said.Last > 3 || said.Exchanged < 100 {
			t.Errorf("%+v", said)
		}
	})
	banger("rm", "-f", "one", "two")
}

// mtuEdges are sizes of datagrams around what an Ethernet carries, what the
// link carries, and what UDP has (RFC 768: 65535 less both headers).
var mtuEdges = []int{1, 1472, 1473, 65492, 65493, 65507}

type transferred struct {
	Bytes   int64
	Equal   bool
	Seconds float64
}

func decode(t testing.TB, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v: %q", err, text)
	}
}

func await(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(90 * time.Second); !is(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 90 s: %s", what)
		}
	}
}
