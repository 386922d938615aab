package guest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"golang.org/x/sys/unix"

	"banger/internal/wire"
)

// tree makes a small root: a value that starts with "->" is a symbolic link,
// a name that ends in "/" a directory; files in a bin folder can be executed.
func tree(t *testing.T, entries map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range entries {
		path := filepath.Join(root, name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		var err error
		if strings.HasSuffix(name, "/") {
			err = os.MkdirAll(path, 0o755)
		} else if target, ok := strings.CutPrefix(text, "->"); ok {
			err = os.Symlink(target, path)
		} else {
			mode := fs.FileMode(0o644)
			if strings.Contains(name, "bin/") || strings.Contains(name, "systemd/") || name == "init" {
				mode = 0o755
			}
			err = os.WriteFile(path, []byte(text), mode)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestResolveIn(t *testing.T) {
	root := tree(t, map[string]string{
		"usr/lib/systemd/systemd": "x", "lib": "->usr/lib", "sbin/init": "->/lib/systemd/systemd",
		"up": "->../../../../../../etc", "etc/here": "x", "abs": "->/etc/here", "loop": "->loop", "dangling": "->/no/such",
	})
	for _, c := range []struct {
		path, want string
		err        error
	}{
		{"/sbin/init", "/usr/lib/systemd/systemd", nil},
		{"/up/here", "/etc/here", nil},
		{"/../../../../etc/here", "/etc/here", nil},
		{"/abs", "/etc/here", nil},
		{"/", "/", nil},
		{"/loop", "", unix.ELOOP},
		{"/dangling", "", unix.ENOENT},
		{"/up/passwd", "", unix.ENOENT}, // is in the host's /etc
	} {
		got, _, err := resolveIn(root, c.path)
		if got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%s: %q, %v", c.path, got, err)
		}
	}
}

func TestMkdirAll(t *testing.T) {
	root := tree(t, map[string]string{"lib": "->usr/lib", "loop": "->loop", "file": "x"})
	if err := mkdirAll(root + "/lib/modules/6.1"); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat(root + "/usr/lib/modules/6.1"); err != nil || !fi.IsDir() {
		t.Error("a dangling link on the way was not followed:", err)
	}
	for _, bad := range []string{"/loop", "/loop/x", "/file", "/file/x"} {
		if mkdirAll(root+bad) == nil {
			t.Errorf("%s: no error", bad)
		}
	}
}

func TestReadBounded(t *testing.T) {
	root := tree(t, map[string]string{"file": "12345", "dir/": ""})
	unix.Mkfifo(root+"/fifo", 0o600)
	for _, c := range []struct {
		name  string
		limit int64
		ok    bool
	}{{"file", 5, true}, {"file", 4, false}, {"dir", 9, false}, {"fifo", 9, false}, {"none", 9, false}} {
		if _, err := readBounded(filepath.Join(root, c.name), c.limit); (err == nil) != c.ok {
			t.Errorf("%s, limit %d: %v", c.name, c.limit, err)
		}
	}
}

func TestReplaceFile(t *testing.T) {
	root := tree(t, map[string]string{"target": "old", "link": "->target"})
	if err := replaceFile(root+"/link", []byte("new"), 0o444); err != nil {
		t.Fatal(err)
	}
	old, _ := os.ReadFile(root + "/target")
	fi, err := os.Lstat(root + "/link")
	if err != nil || fi.Mode() != 0o444 || string(old) != "old" {
		t.Errorf("the link was followed: %v, target %q", fi.Mode(), old)
	}
	os.Mkdir(root+"/dir", 0o755)
	if replaceFile(root+"/dir", nil, 0o644) == nil {
		t.Error("a directory was replaced")
	}
	if names, _ := filepath.Glob(root + "/.banger*"); len(names) > 0 {
		t.Errorf("left behind: %v", names)
	}
}

func TestLookupAccount(t *testing.T) {
	full := tree(t, map[string]string{
		"etc/passwd": "# comment\nbroken\nroot:x:0:0:root:/root:/bin/bash\nann:x:1000:1001:Ann,,,:/home/ann:/bin/zsh\n" +
			"big:x:4294967295:0::/:\n007:x:7:7::/seven:\nrel:x:8:8::home:\n-neg:x:-1:0::/:\n",
		"etc/group": "root:x:0:\nstaff:x:50:ann,bob\naudio:x:29:bob,ann\nannex:x:51:annex\n",
		"root/":     "",
	})
	bare, none := tree(t, map[string]string{"root/": ""}), t.TempDir()
	for _, c := range []struct {
		root, spec string
		want       account
		ok         bool
	}{
		{full, "", account{"root", 0, 0, nil, "/root", "/bin/bash"}, true},
		{full, "root", account{"root", 0, 0, nil, "/root", "/bin/bash"}, true},
		{full, "ann", account{"ann", 1000, 1001, []uint32{50, 29}, "/home/ann", "/bin/zsh"}, true},
		{full, "1000", account{"ann", 1000, 1001, []uint32{50, 29}, "/home/ann", "/bin/zsh"}, true},
		{full, "ann:", account{"ann", 1000, 1001, []uint32{50, 29}, "/home/ann", "/bin/zsh"}, true},
		{full, "ann:staff", account{"ann", 1000, 50, nil, "/home/ann", "/bin/zsh"}, true},
		{full, "ann:9", account{"ann", 1000, 9, nil, "/home/ann", "/bin/zsh"}, true},
		{full, ":staff", account{"root", 0, 50, nil, "/root", "/bin/bash"}, true},
		{full, "5:6", account{"", 5, 6, nil, "/", ""}, true},
		{full, "4294967294", account{"", 4294967294, 0, nil, "/", ""}, true},
		{full, "007", account{"007", 7, 7, nil, "/seven", ""}, true}, // a name comes first
		{full, "rel", account{"rel", 8, 8, nil, "/", ""}, true},      // no absolute home
		{full, "4294967295", account{}, false},
		{full, "big", account{}, false},
		{full, "-1", account{}, false},
		{full, "nobody", account{}, false},
		{full, "ann:nogroup", account{}, false},
		{full, "ann:staff:x", account{}, false},
		{bare, "", account{"root", 0, 0, nil, "/root", ""}, true},
		{none, "root", account{"root", 0, 0, nil, "/", ""}, true},
		{none, "0:0", account{"", 0, 0, nil, "/", ""}, true},
		{none, "ann", account{}, false},
	} {
		got, err := lookupAccount(c.root, c.spec)
		var refusal *wire.Error
		if c.ok != (err == nil) || !c.ok && (!errors.As(err, &refusal) || refusal.Code != wire.ErrNoUser) || c.ok && !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q: %+v, %v; want %+v", c.spec, got, err, c.want)
		}
	}
}

func FuzzAccounts(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/sh\n"), []byte("root:x:0:ann,root\n"), "root")
	f.Add([]byte("::::::\n\x00:\n"), []byte(":::,,\n"), "")
	f.Fuzz(func(t *testing.T, passwd, group []byte, name string) {
		if e, ok := parsePasswd(passwd, func(e passwdEntry) bool { return e.name == name }); ok && (e.name != name || e.uid > maxID) {
			t.Errorf("%+v for %q", e, name)
		}
		if member, _, _ := groupsOf(group, name, name); len(member) > maxGroups {
			t.Errorf("%d groups", len(member))
		}
	})
}

func TestMaskedFstab(t *testing.T) {
	there := func(s string) bool { return s == "/dev/vdz" || s == "/swapfile" || s == "LABEL=a b" }
	for _, c := range []struct {
		line string
		dead bool
	}{
		{"UUID=5f3c / ext4 defaults 0 1", true},
		{"UUID=5f3c /data ext4 defaults", true},
		{"LABEL=data /data ext4", true},
		{`LABEL=a\040b /data ext4`, false},
		{"PARTUUID=1-2 /boot vfat", true},
		{"PARTLABEL=x /boot vfat", true},
		{"/dev/sda1 /data ext4", true},
		{"/dev/vdz /data ext4", false},
		{"/dev/vdz / ext4", true}, // the root is not what an image thinks
		{"/dev/sda2 none swap sw", true},
		{"UUID=1 none swap sw", true},
		{"/swapfile none swap sw", false},
		{"/noswapfile none swap sw", true},
		{"tmpfs /tmp tmpfs defaults 0 0", false},
		{"proc /proc proc", false},
		{"/home /mnt none bind", false},
		{"server:/x /mnt nfs defaults", false},
		{"/dev/sr0 /cdrom iso9660 ro,noauto 0 0", false},
		{"# UUID=5f3c / ext4", false},
		{"  \t", false},
		{"UUID=5f3c", false},
	} {
		got := string(maskedFstab([]byte("a\n"+c.line+"\nb"), there))
		want := "a\n" + c.line + "\nb"
		if c.dead {
			want = "a\n" + fstabMask + c.line + "\nb"
		}
		if got != want {
			t.Errorf("%q: %q", c.line, got)
		}
		if again := string(maskedFstab([]byte(got), there)); again != got {
			t.Errorf("%q is masked twice: %q", c.line, again)
		}
	}
}

func TestDeviceThere(t *testing.T) {
	b := &boot{disks: []disk{{dev: "/dev/vda", uuid: "ab-cd", label: "data"}}}
	for source, want := range map[string]bool{
		"UUID=AB-CD": true, `UUID="ab-cd"`: true, "UUID=ab-ce": false, "LABEL=data": true, "LABEL=": false,
		"PARTUUID=ab-cd": false, "/dev/null": true, "/dev/no-such": false,
		"/dev/disk/by-uuid/ab-cd": true, "/dev/disk/by-label/x": false, "/dev/disk/by-id/x": false,
	} {
		if b.deviceThere(source) != want {
			t.Errorf("%s: %v", source, !want)
		}
	}
}

func TestChooseInit(t *testing.T) {
	debian := tree(t, map[string]string{"usr/lib/systemd/systemd": "x", "lib": "->usr/lib", "usr/sbin/init": "->/lib/systemd/systemd", "sbin": "->usr/sbin", "bin/sh": "x"})
	alpine := tree(t, map[string]string{"bin/busybox": "x", "sbin/init": "->/bin/busybox", "bin/sh": "->/bin/busybox"})
	gentoo := tree(t, map[string]string{"sbin/openrc-init": "x", "sbin/init": "->openrc-init"})
	sysv := tree(t, map[string]string{"sbin/init": "x"})
	s6 := tree(t, map[string]string{"init": "x"})
	broken := tree(t, map[string]string{"sbin/init": "->/no/such", "etc/init": "not executable"})
	scratch := t.TempDir()
	words := strings.Fields
	for _, c := range []struct {
		name, root, init, entrypoint, cmd string
		kind                              initKind
		args                              string
		bad                               bool
	}{
		{"systemd, no command", debian, "auto", "", "", kindSystemd, "/sbin/init", false},
		{"systemd, shell", debian, "auto", "", "bash", kindSystemd, "/sbin/init", false},
		{"systemd, login shell", debian, "auto", "", "/bin/bash -l", kindSystemd, "/sbin/init", false},
		{"systemd, shell that runs something", debian, "auto", "", "sh -c server", kindReaper, reaperName, false},
		{"systemd, a program", debian, "auto", "", "nginx", kindReaper, reaperName, false},
		{"systemd, an entrypoint", debian, "auto", "/entry.sh", "bash", kindReaper, reaperName, false},
		{"systemd named", debian, "auto", "", "/lib/systemd/systemd --log-level=debug", kindSystemd, "/lib/systemd/systemd --log-level=debug", false},
		{"systemd as entrypoint", debian, "auto", "/sbin/init", "", kindSystemd, "/sbin/init", false},
		{"systemd by image", debian, "image", "/entry.sh", "", kindSystemd, "/sbin/init", false},
		{"systemd by agent", debian, "agent", "", "/sbin/init", kindReaper, reaperName, false},
		{"busybox, shell", alpine, "auto", "", "/bin/sh", kindReaper, reaperName, false},
		{"busybox named", alpine, "auto", "", "/sbin/init", kindBusybox, "/sbin/init", false},
		{"busybox by image", alpine, "image", "", "/bin/sh", kindBusybox, "/sbin/init", false},
		{"openrc", gentoo, "auto", "", "", kindOpenRC, "/sbin/init", false},
		{"sysvinit", sysv, "auto", "", "", kindReaper, reaperName, false},
		{"sysvinit by image", sysv, "image", "", "", kindOther, "/sbin/init", false},
		{"s6", s6, "auto", "/init", "", kindOther, "/init", false},
		{"dangling", broken, "auto", "", "", kindReaper, reaperName, false},
		{"dangling by image", broken, "image", "", "", "", "", true},
		{"not executable", broken, "auto", "", "/etc/init", kindReaper, reaperName, false},
		{"relative", debian, "auto", "", "init", kindReaper, reaperName, false},
		{"scratch", scratch, "auto", "/prog", "", kindReaper, reaperName, false},
		{"scratch by image", scratch, "image", "/prog", "", "", "", true},
		{"no such choice", debian, "systemd", "", "", "", "", true},
	} {
		got, err := chooseInit(c.root, &wire.BootConfig{Init: c.init, Entrypoint: words(c.entrypoint), Cmd: words(c.cmd)})
		if (err != nil) != c.bad || err == nil && (got.Kind != c.kind || strings.Join(got.Args, " ") != c.args) {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
}

func TestDisks(t *testing.T) {
	dir := t.TempDir()
	sys, dev := filepath.Join(dir, "sys"), filepath.Join(dir, "dev")
	os.MkdirAll(dev, 0o755)
	super := func(name string, magic uint16, id byte, size int) {
		os.MkdirAll(filepath.Join(sys, name), 0o755)
		b := make([]byte, superOffset+superBytes)
		binary.LittleEndian.PutUint16(b[superOffset+superMagicAt:], magic)
		b[superOffset+superUUIDAt+15] = id
		copy(b[superOffset+superLabelAt:], "a label of 16 by")
		os.WriteFile(filepath.Join(dev, name), b[:size], 0o600)
	}
	const whole = superOffset + superBytes
	super("vda", superMagic, 1, whole)
	super("vdb", superMagic+1, 2, whole)
	super("vdc", superMagic, 3, whole-1)
	super("vdd", superMagic, 4, whole)
	list := func() []disk { return listDisks(sys, dev) }
	one, four := "00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000004"
	if got := list(); len(got) != 2 || got[0].label != "a label of 16 by" {
		t.Errorf("disks: %+v", got)
	}
	devs, _, err := findDisks([]string{four, one, ""}, 0, list)
	if err != nil || devs[0] != dev+"/vdd" || devs[1] != dev+"/vda" || devs[2] != "" {
		t.Errorf("found %v, %v", devs, err)
	}
	if _, _, err := findDisks([]string{"00000000-0000-0000-0000-000000000003"}, 20*time.Millisecond, list); err == nil {
		t.Error("a truncated superblock was found")
	}
	super("vde", superMagic, 1, whole)
	if _, _, err := findDisks([]string{one}, 0, list); err == nil || !strings.Contains(err.Error(), "both") {
		t.Errorf("two disks of one UUID: %v", err)
	}
	// A disk that appears late is waited for.
	calls := 0
	late := func() []disk {
		if calls++; calls < 3 {
			return nil
		}
		return []disk{{dev: "/dev/late", uuid: one}}
	}
	if devs, _, err := findDisks([]string{one}, time.Second, late); err != nil || devs[0] != "/dev/late" {
		t.Errorf("late disk: %v, %v", devs, err)
	}
}

func TestParseMounts(t *testing.T) {
	text := `22 1 0:20 / / rw,relatime - overlay overlay rw,lowerdir=/a
23 22 254:0 / /with\040space rw shared:1 master:2 - ext4 /dev/vdb rw
garbage
24 22 0:5 / /short rw -
`
	got := parseMounts(strings.NewReader(text))
	want := []mount{{"/", "overlay", "overlay"}, {"/with space", "ext4", "/dev/vdb"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	if len(listMounts()) == 0 {
		t.Error("this process has no mounts?")
	}
}

func TestHostname(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "web-1.example": true, strings.Repeat("a", maxHostnameBytes): true, strings.Repeat("a", maxHostnameBytes+1): false,
		"": false, "-a": false, ".": false, "a b": false, "a\nb": false, "ä": false,
	} {
		if validHostname(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
}

// TestChannel is a host, and the next, on one port: hello works, only the
// agent's service is served, and a host that follows at once, or one that
// follows a host which died inside its handshake, is answered.
func TestChannel(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPort(os.NewFile(uintptr(fds[0]), "port"))
	if err != nil {
		t.Fatal(err)
	}
	go newServer("", newJournal(nil)).servePort(p)
	wireEnd := os.NewFile(uintptr(fds[1]), "host")
	host, err := net.FileConn(wireEnd)
	wireEnd.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()

	hello := func(mux *yamux.Session, service uint32) (wire.Reply, error) {
		conn, err := mux.Open()
		if err != nil {
			return wire.Reply{}, err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		var number [4]byte
		binary.BigEndian.PutUint32(number[:], service)
		conn.Write(number[:])
		wire.WriteMessage(conn, wire.Request{Version: wire.Version, Op: wire.OpHello})
		var r wire.Reply
		return r, wire.ReadMessage(conn, &r)
	}
	host.Write([]byte("junk of an earlier host"))
	for i := range 4 {
		host.SetDeadline(time.Now().Add(5 * time.Second))
		if i == 2 { // this host dies after its magic and three bytes of nonce
			if _, err := host.Write([]byte("banger-host/1\nabc")); err != nil {
				t.Fatal(err)
			}
		}
		if err := wire.HandshakeHost(host, [wire.NonceBytes]byte{byte(i + 1)}); err != nil {
			t.Fatalf("host %d: %v", i, err)
		}
		host.SetDeadline(time.Time{})
		// The session's end must not end the port.
		mux, err := yamux.Client(keepOpen{host}, muxConfig())
		if err != nil {
			t.Fatal(err)
		}
		if r, err := hello(mux, wire.AgentPort); err != nil || r.Hello == nil {
			t.Fatalf("host %d: %+v %v", i, r, err)
		}
		if _, err := hello(mux, wire.AgentPort+1); err == nil {
			t.Error("another service was served")
		}
		mux.Close()
	}
}

// keepOpen is a host that leaves without the port noticing.
type keepOpen struct{ net.Conn }

func (k keepOpen) Close() error { return k.SetDeadline(time.Unix(1, 0)) }

func TestStdinQueue(t *testing.T) {
	var q stdinQueue
	q.init()
	if !q.put(make([]byte, wire.StdinWindowBytes)) || q.put([]byte{0}) {
		t.Error("the window is not the window")
	}
	buf := make([]byte, wire.StdinWindowBytes)
	if n, ok := q.take(buf); n != len(buf) || !ok {
		t.Errorf("took %d, %v", n, ok)
	}
	q.put([]byte("rest"))
	q.end()
	if q.put(nil) {
		t.Error("bytes after the end")
	}
	if n, ok := q.take(buf); !ok || !bytes.Equal(buf[:n], []byte("rest")) {
		t.Errorf("rest: %d, %v", n, ok)
	}
	if _, ok := q.take(buf); ok {
		t.Error("no end")
	}
}

// The files for a foreign boot go, and nothing else of systemd's is touched.
func TestDropForeign(t *testing.T) {
	root := t.TempDir()
	const mine = "/etc/modules-load.d/mine.conf"
	for _, path := range append([]string{mine}, foreign...) {
		if err := os.MkdirAll(filepath.Dir(root+path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(root+path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second time they are gone already
		if err := dropForeign(root); err != nil {
			t.Fatal(err)
		}
	}
	var left []string
	filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			left = append(left, strings.TrimPrefix(path, root))
		}
		return err
	})
	if !slices.Equal(left, []string{mine}) {
		t.Errorf("left: %q", left)
	}
}

func TestMaskStaticNodes(t *testing.T) {
	for name, row := range map[string]struct {
		entries map[string]string
		masked  bool
	}{
		"no kmod":            {map[string]string{"bin/sh": "x"}, true},
		"kmod":               {map[string]string{"bin/kmod": "x"}, false},
		"kmod, merged /usr":  {map[string]string{"usr/bin/kmod": "x", "bin": "->usr/bin"}, false},
		"a link to nothing":  {map[string]string{"bin/kmod": "->/usr/bin/kmod"}, true},
		"a folder":           {map[string]string{"bin/kmod/": ""}, true},
		"masked by somebody": {map[string]string{"run/systemd/system/kmod-static-nodes.service": "->/dev/null"}, true},
	} {
		root := tree(t, row.entries)
		if err := maskStaticNodes(root); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		target, err := os.Readlink(root + "/run/systemd/system/kmod-static-nodes.service")
		if masked := err == nil && target == "/dev/null"; masked != row.masked {
			t.Errorf("%s: masked: %v", name, masked)
		}
	}
}

func TestStaticNodes(t *testing.T) {
	if os.Geteuid() != 0 {
		missing(t, "device nodes need root")
	}
	dev := t.TempDir()
	staticNodes([]byte("# Device nodes\nfuse fuse c10:229\ntun net/tun c10:200\nloop loop-control c10:237\nbad ../x c1:1\nbad /x c1:1\n"+
		"bad x1 c1\nbad x2 d1:1\nbad x3 c4096:1\nbad x4 c1:1048576\nbad x5\nblk disk b4095:1048575\n\xff\n"), dev)
	want := map[string]string{"fuse": "Dcrw-rw-rw- 10:229", "net/tun": "Dcrw-rw-rw- 10:200", "loop-control": "Dcrw------- 10:237", "disk": "Drw------- 4095:1048575"}
	got := map[string]string{}
	filepath.WalkDir(dev, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		info, err := d.Info()
		got[strings.TrimPrefix(path, dev+"/")] = fmt.Sprintf("%v %d:%d", info.Mode(), unix.Major(st.Rdev), unix.Minor(st.Rdev))
		return err
	})
	if !maps.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
}
