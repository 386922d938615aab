package e2e

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// counter stands before a registry and notes which blobs are fetched.
type counter struct {
	mu    sync.Mutex
	blobs []string
}

var blobPath = regexp.MustCompile(`/blobs/(sha256:[0-9a-f]{64})$`)

// startCounter gives the address of what stands before the registry.
func startCounter(t *testing.T, registry string) (*counter, string) {
	t.Helper()
	c := new(counter)
	to := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: registry})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if m := blobPath.FindStringSubmatch(r.URL.Path); m != nil && r.Method == http.MethodGet {
			c.mu.Lock()
			c.blobs = append(c.blobs, m[1])
			c.mu.Unlock()
		}
		to.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return c, strings.TrimPrefix(s.URL, "http://")
}

// take gives the blobs fetched since the last call, sorted.
func (c *counter) take() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() { c.blobs = nil }()
	return slices.Sorted(slices.Values(c.blobs))
}

// newStore is a store of this test's own with the kernel that all share. What
// runs for it is ended with the test.
func newStore(t *testing.T) (home string) {
	t.Helper()
	home = filepath.Join(t.TempDir(), "home")
	must(t, os.Mkdir(home, 0o700))
	must(t, os.Symlink(world.kernels, filepath.Join(home, "kernels")))
	t.Cleanup(func() {
		for _, p := range processesOf(home) {
			syscall.Kill(p.pid, syscall.SIGKILL)
		}
	})
	return home
}

// banger runs the command line on a store and gives what it prints.
func banger(t *testing.T, home string, args ...string) string {
	t.Helper()
	cmd := exec.Command(filepath.Join(world.bin, "banger"), args...)
	cmd.Env = append(os.Environ(), "BANGER_HOME="+home)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("banger %q: %v\n%s%s", args, err, out, said.String())
	}
	return string(out)
}

// TestRealImages pulls real images from a real registry in both forms, holds
// every entry of their bases against what GNU tar makes of the same layers, and
// boots each to a command that proves something of it.
func TestRealImages(t *testing.T) {
	set := realImages(t)
	reg, err := startRegistry(filepath.Dir(set.storage), true)
	must(t, err)
	t.Cleanup(reg.stop)
	fetched, addr := startCounter(t, reg.addr)
	home := newStore(t)
	scratch := scratchFS(t, "4G")

	have := make(map[string]bool) // blobs in the store
	// What a pull fetched: each layer that was not there once, and a config.
	onlyNew := func(t *testing.T, tag string) {
		t.Helper()
		var want []string
		for _, b := range set.Blobs[tag] {
			if !have[b] {
				want = append(want, b)
			}
			have[b] = true
		}
		slices.Sort(want)
		want = slices.Compact(want)
		got := fetched.take()
		layers := slices.DeleteFunc(slices.Clone(got), func(b string) bool { return !slices.Contains(set.Blobs[tag], b) })
		if !slices.Equal(layers, want) || len(got)-len(layers) > 1 {
			t.Errorf("%s: %d blobs were fetched, %d of them layers; %d were new", tag, len(got), len(layers), len(want))
		}
	}
	var comparing, booting time.Duration
	for _, row := range []struct {
		name    string
		run     []string // flags of run
		command []string // nil: the image's own
		want    string   // what it prints, a regular expression
	}{
		{
			name: "busybox", command: []string{"sh", "-c", "id -u; echo banger | sha256sum; mount | grep ' on / '"},
			want: "0\nbd723fea413ac8e73bef143bcd1cf7ebf5aaaa966930e9f00ef1b4ae88d3be2f  -\noverlay on / type overlay",
		},
		{name: "static", want: "hello from /prog\n"},
		{
			name: "systemd", run: []string{"--wait", "init"},
			command: []string{"bash", "-c", `systemctl is-system-running; systemctl is-active ssh nginx; systemctl is-enabled systemd-udev-trigger
				exec 3<>/dev/tcp/127.0.0.1/80; printf 'GET / HTTP/1.0\r\n\r\n' >&3; head -1 <&3; head -1 </dev/tcp/127.0.0.1/22`},
			want: "running\nactive\nactive\nstatic\nHTTP/1.1 200 OK\r\nSSH-2.0-OpenSSH_[0-9.]+",
		},
		{
			name: "python", command: []string{"python3", "-c", "import json, sqlite3, ssl, sys; print(sys.version_info[0], sqlite3.connect(':memory:').execute('select 6*7').fetchone(), len(json.dumps({'a': 1})))"},
			want: `^3 \(42,\) 8\n$`,
		},
		{
			name: "gcc", command: []string{"sh", "-c", `cd /tmp && printf '#include <stdio.h>\n#include <sys/utsname.h>\nint main(void) { struct utsname u; uname(&u); return printf("%%s compiled\\n", u.sysname) < 0; }' >h.c && printf 'h: h.c\n\tgcc -O2 -Wall -o h h.c\n' >Makefile && make -s h && ./h`},
			want: "^Linux compiled\n$",
		},
		{
			name: "attrs", command: []string{"sh", "-c", `cd /attrs/fixed; getcap capped; getfacl -cnp acl acl/file; getfattr --only-values -n user.note third; echo
				stat -c '%n %A %u:%g %h %s %t:%T %Y' setuid one/name two/name third null loop fifo sparse old new
				test one/name -ef two/name && test one/name -ef third && echo one; tail -c 3 sparse; echo
				su -s /bin/sh nobody -c 'ping -q -c 1 -W 5 127.0.0.1' | grep received; ls -A /attrs | wc -l`},
			want: `^capped cap_net_bind_service,cap_net_raw=ep
user::rwx
user:1000:rwx
group::r-x
group:1001:r-x
mask::rwx
other::r-x
default:user::rwx
default:user:1000:rw-
default:group::r--
default:mask::rw-
default:other::---

user::rw-
user:1000:r--
group::r--
mask::r--
other::---

kept
setuid -rwsr-sr-x 1000:1001 1 6 0:0 \d+
one/name -rw-r--r-- 0:0 3 6 0:0 \d+
two/name -rw-r--r-- 0:0 3 6 0:0 \d+
third -rw-r--r-- 0:0 3 6 0:0 \d+
null crw-r--r-- 0:0 1 0 1:3 \d+
loop brw-r--r-- 0:0 1 0 7:11170 \d+
fifo prw-r--r-- 0:0 1 0 0:0 \d+
sparse -rw-r--r-- 0:0 1 5242883 0:0 \d+
old -rw-r--r-- 0:0 1 0 0:0 -149810340
new -rw-r--r-- 3000000000:3000000001 1 0 0:0 4102542245
one
end
1 packets transmitted, 1 received, .*
[1-9]\d*
$`,
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			begin := time.Now()
			var lists []map[string]string
			for _, form := range []compression{gz, zst} {
				tag := row.name + ":" + string(form)
				banger(t, home, "image", "pull", "--name", row.name+"-"+string(form), addr+"/real/"+tag)
				onlyNew(t, tag)
				base := baseOf(t, home, row.name+"-"+string(form))
				if out, err := exec.Command("e2fsck", "-fn", base).CombinedOutput(); err != nil {
					t.Errorf("e2fsck -fn: %v\n%s", err, out)
				}
				list, err := listing(mountImage(t, base, "ro,noload"))
				must(t, err)
				lists = append(lists, list)
			}
			root := filepath.Join(scratch, "root")
			must(t, os.Mkdir(root, 0o755))
			defer os.RemoveAll(root)
			var files []string
			for _, digest := range set.Blobs[row.name+":gzip"] {
				sum := strings.TrimPrefix(digest, "sha256:")
				files = append(files, filepath.Join(set.storage, "docker/registry/v2/blobs/sha256", sum[:2], sum, "data"))
			}
			unpack(t, root, gz, files)
			want, err := listing(root)
			must(t, err)
			if len(want) < 2 {
				t.Fatalf("%d entries: the unpacking is wrong", len(want))
			}
			for i, list := range lists {
				d := compareLists(list, want)
				if len(d) > 20 {
					d = append(d[:20], "...")
				}
				if d != nil {
					t.Errorf("the base made from %s, %d entries:\n%s", []compression{gz, zst}[i], len(want), strings.Join(d, "\n"))
				}
			}
			took := time.Since(begin)
			comparing += took

			begin = time.Now()
			args := slices.Concat([]string{"run"}, row.run, []string{row.name + "-gzip"})
			if row.command != nil {
				args = slices.Concat(args, []string{"--"}, row.command)
			}
			if out := banger(t, home, args...); !regexp.MustCompile(row.want).MatchString(out) {
				t.Errorf("it printed\n%s\nwant\n%s", out, row.want)
			}
			booting += time.Since(begin)
			t.Logf("%d entries in %d layers: pulled twice and compared in %.1f s, booted in %.1f s", len(want), len(files), took.Seconds(), time.Since(begin).Seconds())
		})
	}
	t.Logf("six comparisons in %.1f s, six boots in %.1f s", comparing.Seconds(), booting.Seconds())

	// Another base of layers that are all there: nothing but its config is
	// fetched.
	t.Run("trimmed", func(t *testing.T) {
		banger(t, home, "image", "pull", "--trim", addr+"/real/systemd:gzip")
		onlyNew(t, "systemd:gzip")
	})
}

// baseOf is the path of an image's base.
func baseOf(t *testing.T, home, name string) string {
	t.Helper()
	m := regexp.MustCompile(`"rootfs": "([^"]+)"`).FindStringSubmatch(banger(t, home, "image", "inspect", "--json", name))
	if m == nil {
		t.Fatal("no rootfs")
	}
	return m[1]
}
