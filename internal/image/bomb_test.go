package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"banger"
)

// A bomb is an image that is small to send and would be large to have.
type bomb struct {
	name string
	make func(b *bombMaker)
	want string // of the reason; "": it is taken
	soak bool   // too slow for every day
}

// A bombMaker writes layers as streams, and documents that no tool would write.
type bombMaker struct {
	*layout
	descriptors []map[string]any
	diffIDs     []string
	config      map[string]any
	manifest    []byte // instead of the ordinary one
}

// layer adds what write writes, stored as gzip, zstd or plain ("").
func (b *bombMaker) layer(kind string, write func(w io.Writer)) {
	b.t.Helper()
	f, err := os.CreateTemp(b.dir, "layer-")
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	stored, raw := sha256.New(), sha256.New()
	out := io.MultiWriter(f, stored)
	var in io.WriteCloser
	switch kind {
	case "gzip":
		in, _ = gzip.NewWriterLevel(out, gzip.BestSpeed)
	case "zstd":
		in, err = zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
	default:
		in = nopCloser{out}
	}
	if err != nil {
		b.t.Fatal(err)
	}
	write(io.MultiWriter(in, raw))
	if err := in.Close(); err != nil {
		b.t.Fatal(err)
	}
	st, err := f.Stat()
	if err != nil {
		b.t.Fatal(err)
	}
	digest := hex.EncodeToString(stored.Sum(nil))
	if err := os.MkdirAll(filepath.Join(b.dir, "blobs/sha256"), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Rename(f.Name(), filepath.Join(b.dir, "blobs/sha256", digest)); err != nil {
		b.t.Fatal(err)
	}
	if kind != "" {
		kind = "+" + kind
	}
	b.descriptors = append(b.descriptors, map[string]any{"mediaType": "application/vnd.oci.image.layer.v1.tar" + kind, "digest": "sha256:" + digest, "size": st.Size()})
	b.diffIDs = append(b.diffIDs, "sha256:"+hex.EncodeToString(raw.Sum(nil)))
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// entries adds a gzip layer of so many entries.
func (b *bombMaker) entries(n int, header func(i int) *tar.Header) {
	b.layer("gzip", func(out io.Writer) {
		w := tar.NewWriter(out)
		for i := range n {
			if err := w.WriteHeader(header(i)); err != nil {
				b.t.Fatal(err)
			}
		}
		w.Close()
	})
}

// finish writes the documents.
func (b *bombMaker) finish() {
	b.t.Helper()
	b.config["rootfs"] = map[string]any{"type": "layers", "diff_ids": b.diffIDs}
	const media = "application/vnd.oci.image.manifest.v1+json"
	config := b.json("application/vnd.oci.image.config.v1+json", b.config)
	m := b.layout.json(media, map[string]any{"schemaVersion": 2, "mediaType": media, "config": config, "layers": b.descriptors})
	if b.manifest != nil {
		m = b.blob(media, b.manifest)
	}
	m["annotations"] = map[string]string{"org.opencontainers.image.ref.name": "a"}
	index := b.layout.json("", map[string]any{"schemaVersion": 2, "manifests": []any{m}})
	b.copyBlob(index["digest"].(string), "index.json")
}

func (b *bombMaker) copyBlob(digest, to string) {
	data, err := os.ReadFile(filepath.Join(b.dir, "blobs/sha256", strings.TrimPrefix(digest, "sha256:")))
	if err != nil {
		b.t.Fatal(err)
	}
	b.write(to, data)
}

// zeros writes an entry of so many bytes and as many zeros as are asked for.
func zeros(w io.Writer, name string, sizeBytes, written int64) {
	t := tar.NewWriter(w)
	t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: sizeBytes, Mode: 0o644})
	block := make([]byte, 1<<20)
	for ; written > 0; written -= int64(len(block)) {
		t.Write(block[:min(written, int64(len(block)))])
	}
	if written == 0 && sizeBytes == 0 {
		t.Close()
	}
}

// rawHeader is a ustar header that says what archive/tar would not write.
func rawHeader(name string, typ byte, sizeBytes int64) []byte {
	var h [512]byte
	copy(h[:], name)
	copy(h[100:], "0000644\x000000000\x000000000\x00")
	copy(h[124:], fmt.Sprintf("%011o\x0000000000000\x00", sizeBytes))
	copy(h[148:], "        ")
	h[156] = typ
	copy(h[257:], "ustar\x0000")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	return h[:]
}

// paxEntry is a pax header of records, then an empty file.
func paxEntry(w io.Writer, records ...string) {
	paxRecords(w, records...)
	w.Write(rawHeader("x", '0', 0))
	w.Write(make([]byte, 1024))
}

func paxRecords(w io.Writer, records ...string) {
	var b bytes.Buffer
	for _, r := range records {
		n := len(r) + 3
		for len(strconv.Itoa(n))+len(r)+2 != n {
			n++
		}
		fmt.Fprintf(&b, "%d %s\n", n, r)
	}
	w.Write(rawHeader("pax", 'x', int64(b.Len())))
	w.Write(b.Bytes())
	w.Write(make([]byte, (512-b.Len()%512)%512))
}

func regular(name string) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}
}

var bombs = []bomb{
	{name: "gzip of zeros, 1000:1", want: "expands", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) { zeros(w, "zeros", 40<<30, 1200<<20) })
	}},
	{name: "zstd of zeros, 20000:1", soak: true, want: "expands", make: func(b *bombMaker) {
		b.layer("zstd", func(w io.Writer) { zeros(w, "zeros", 40<<30, 1200<<20) })
	}},
	{name: "zeros after the end of the tar", soak: true, want: "expands", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) {
			w.Write(make([]byte, 1024))
			block := make([]byte, 1<<20)
			for range 1200 {
				w.Write(block)
			}
		})
	}},
	{name: "a gigabyte of zeros", soak: true, want: "", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) { zeros(w, "zeros", 1000<<20, 1000<<20) })
	}},
	{name: "gzip in gzip", want: "not a tar archive", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) {
			z := gzip.NewWriter(w)
			zeros(z, "zeros", 1<<20, 1<<20)
			z.Close()
		})
	}},
	{name: "zstd that wants 2 GiB of window", want: "window of more than", make: func(b *bombMaker) {
		b.layer("", func(w io.Writer) {
			w.Write([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3}) // RFC 8878 section 3.1.1.1.2: 2^(10+21)
			w.Write([]byte{1, 0, 0})
		})
		b.descriptors[0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+zstd"
	}},
	{name: "a million empty gzip members", want: "", make: func(b *bombMaker) {
		b.layer("", func(w io.Writer) {
			var member bytes.Buffer
			z := gzip.NewWriter(&member)
			z.Close()
			for range 1000 {
				w.Write(bytes.Repeat(member.Bytes(), 1000))
			}
		})
		b.descriptors[0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip"
		b.diffIDs[0] = sum(nil)
	}},
	{name: "1,000,001 empty entries", soak: true, want: "more than 1000000 entries", make: func(b *bombMaker) {
		b.entries(1_000_001, func(i int) *tar.Header { return regular(strconv.Itoa(i)) })
	}},
	{name: "1,000,000 empty entries", soak: true, want: "", make: func(b *bombMaker) {
		b.entries(1_000_000-1, func(i int) *tar.Header { return regular(strconv.Itoa(i)) })
	}},
	{name: "the same name a million times", soak: true, want: "more than 1000000 entries", make: func(b *bombMaker) {
		b.entries(1_000_001, func(i int) *tar.Header { return regular("same") })
	}},
	{name: "directories that a thousand names imply", want: "bytes of memory", make: func(b *bombMaker) {
		b.entries(1000, func(i int) *tar.Header { return regular(fmt.Sprintf("%d/%s", i, strings.Repeat("d/", 1100)+"x")) })
	}},
	{name: "a sparse file of 1 PiB", want: "files of more than 68719476736 bytes", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) {
			const size = 1 << 50
			paxRecords(w, "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=hole", fmt.Sprint("GNU.sparse.realsize=", int64(size)))
			w.Write(rawHeader("hole", '0', 512))
			io.WriteString(w, fmt.Sprintf("%-512s", fmt.Sprintf("1\n%d\n0\n", int64(size))))
			w.Write(make([]byte, 1024))
		})
	}},
	{name: "a pax header of 1 GiB", want: "header field", make: func(b *bombMaker) {
		b.layer("zstd", func(w io.Writer) {
			w.Write(rawHeader("pax", 'x', 1<<30))
			block := make([]byte, 1<<20)
			for range 32 { // of the 1024
				w.Write(block)
			}
		})
	}},
	{name: "a name of 1 GiB", want: "header field", make: func(b *bombMaker) {
		b.layer("zstd", func(w io.Writer) {
			w.Write(rawHeader("././@LongLink", 'L', 1<<30))
			block := bytes.Repeat([]byte("n"), 1<<20)
			for range 32 { // of the 1024
				w.Write(block)
			}
		})
	}},
	{name: "100,000 xattrs", want: "header field", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) {
			var records []string
			for i := range 100_000 {
				records = append(records, fmt.Sprintf("SCHILY.xattr.user.%d=v", i))
			}
			paxEntry(w, records...)
		})
	}},
	{name: "30,000 xattrs", want: "xattrs of more than 65536 bytes", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) {
			var records []string
			for i := range 30_000 {
				records = append(records, fmt.Sprintf("SCHILY.xattr.user.%d=v", i))
			}
			paxEntry(w, records...)
		})
	}},
	{name: "xattrs of 64 KiB on 5,000 files", want: "bytes of memory", make: func(b *bombMaker) {
		value := strings.Repeat("v", 60_000)
		b.entries(5000, func(i int) *tar.Header {
			h := regular(strconv.Itoa(i))
			h.PAXRecords = map[string]string{"SCHILY.xattr.user.a": fmt.Sprint(i, value)}
			return h
		})
	}},
	{name: "a path 500,000 deep", want: "path longer than 4096", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) { paxEntry(w, "path="+strings.Repeat("d/", 500_000)+"x") })
	}},
	{name: "a path a million deep", want: "header field", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) { paxEntry(w, "path="+strings.Repeat("d/", 1_000_000)+"x") })
	}},
	{name: "70,000 symlinks of 4,095 bytes", soak: true, want: "bytes of memory", make: func(b *bombMaker) {
		target := strings.Repeat("t", 4085)
		b.entries(70_000, func(i int) *tar.Header {
			return &tar.Header{Typeflag: tar.TypeSymlink, Name: strconv.Itoa(i), Linkname: fmt.Sprintf("%s%010d", target, i)}
		})
	}},
	{name: "names through forty symlinks of 2,000 steps", want: "steps", make: func(b *bombMaker) {
		b.entries(300_000, func(i int) *tar.Header {
			if i < 39 {
				return &tar.Header{Typeflag: tar.TypeSymlink, Name: strconv.Itoa(i), Linkname: strings.Repeat("./", 2000) + strconv.Itoa(i+1)}
			}
			if i == 39 {
				return &tar.Header{Typeflag: tar.TypeDir, Name: "39", Mode: 0o755}
			}
			return regular(fmt.Sprintf("0/%d", i))
		})
	}},
	{name: "a million hard links to nothing", soak: true, want: "not there", make: func(b *bombMaker) {
		b.entries(1_000_000, func(i int) *tar.Header {
			return &tar.Header{Typeflag: tar.TypeLink, Name: strconv.Itoa(i), Linkname: "last"}
		})
	}},
	{name: "a chain of 100,000 hard links, backwards", want: "not there", make: func(b *bombMaker) {
		b.entries(100_000, func(i int) *tar.Header {
			return &tar.Header{Typeflag: tar.TypeLink, Name: strconv.Itoa(i), Linkname: strconv.Itoa(i + 1)}
		})
	}},
	{name: "a million whiteouts", soak: true, want: "", make: func(b *bombMaker) {
		b.entries(1_000_000, func(i int) *tar.Header { return regular(fmt.Sprintf(".wh.%d", i)) })
	}},
	{name: "500,000 names of 255 bytes", soak: true, want: "", make: func(b *bombMaker) {
		b.entries(500_000, func(i int) *tar.Header { return regular(fmt.Sprintf("%0255d", i)) })
	}},
	{name: "600,000 names of 255 bytes", soak: true, want: "bytes of memory", make: func(b *bombMaker) {
		b.entries(600_000, func(i int) *tar.Header { return regular(fmt.Sprintf("%0255d", i)) })
	}},
	{name: "a thousand layers", want: "1000 layers, at most 128", make: func(b *bombMaker) {
		for i := range 1000 {
			b.layer("gzip", func(w io.Writer) { zeros(w, strconv.Itoa(i), 0, 0) })
		}
	}},
	{name: "a layer twice 128 times", want: "", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) { zeros(w, "zeros", 4<<20, 4<<20); w.Write(make([]byte, 1024)) })
		for len(b.descriptors) < 128 {
			b.descriptors, b.diffIDs = append(b.descriptors, b.descriptors[0]), append(b.diffIDs, b.diffIDs[0])
		}
	}},
	{name: "a manifest nested 64 Ki deep", want: "nested deeper than 64", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) { zeros(w, "x", 0, 0) })
		b.manifest = []byte(`{"schemaVersion":2,"x":` + strings.Repeat("[", 64<<10) + strings.Repeat("]", 64<<10) + "}")
	}},
	{name: "a manifest of 4 MiB and one", want: "at most 4194304 are taken", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) { zeros(w, "x", 0, 0) })
		b.manifest = append([]byte("{"), bytes.Repeat([]byte(" "), 4<<20)...)
	}},
	{name: "a config nested 64 Ki deep", want: "config", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) { zeros(w, "x", 0, 0) })
		deep := any(1)
		for range 9_000 { // what encoding/json writes itself
			deep = []any{deep}
		}
		b.config["x"] = deep
		b.config["y"] = strings.Repeat("\x00", 2<<20) // six bytes each
	}},
	{name: "a config of three million words", soak: true, want: "words of entrypoint", make: func(b *bombMaker) {
		b.layer("gzip", func(w io.Writer) { zeros(w, "x", 0, 0) })
		b.config["config"] = map[string]any{"Cmd": make([]string, 2_700_000)}
	}},
}

// labels stand before a reason and are of no interest in a table.
var labels = regexp.MustCompile(`^image "[^"]*": |layer sha256:[0-9a-f]*: `)

// bombLimit is how much CPU a bomb may take, and how long, on a machine that is
// busy with other things.
const (
	bombLimitCPU = 30 * time.Second
	bombLimit    = 2 * time.Minute
)

// TestBombs pulls each bomb in a process of its own.
func TestBombs(t *testing.T) {
	const dirVar = "BANGER_TEST_BOMB"
	if dir := os.Getenv(dirVar); dir != "" {
		LimitMemory()
		im, s := openStore(t, filepath.Join(dir, "state"))
		l := &layout{t: t, dir: dir}
		src, ref := l.reference("a")
		src.Blobs = &blobs{Blobs: s.Blobs()}
		ctx, cancel := context.WithTimeout(t.Context(), bombLimit)
		defer cancel()
		_, err := im.Pull(ctx, src, ref, PullOptions{Name: "x", Agent: agentFile(t)})
		status, _ := os.ReadFile("/proc/self/status")
		fmt.Printf("\n%s\ncode %q error %v\n", regexp.MustCompile(`VmHWM:\s+\d+ kB`).Find(status), banger.CodeOf(err), err)
		return
	}
	only := os.Getenv("IMAGE_BOMB")
	refused, taken, worst := 0, 0, 0
	for _, b := range bombs {
		if b.soak && os.Getenv("IMAGE_SOAK") == "" || only != "" && !strings.Contains(b.name, only) {
			continue
		}
		dir, err := os.MkdirTemp("/dev/shm", "banger-bomb-")
		if err != nil {
			dir = t.TempDir()
		}
		defer os.RemoveAll(dir)
		m := &bombMaker{layout: &layout{t: t, dir: dir}, config: map[string]any{"architecture": "amd64", "os": "linux"}}
		m.write("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
		b.make(m)
		m.finish()
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestBombs$")
		cmd.Env = append(os.Environ(), dirVar+"="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", b.name, err, out)
		}
		f := regexp.MustCompile(`VmHWM:\s+(\d+) kB\ncode "(.*)" error (.*)\n`).FindSubmatch(out)
		if f == nil {
			t.Fatalf("%s: %q", b.name, out)
		}
		peak, _ := strconv.Atoi(string(f[1]))
		reason := string(f[3])
		cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
		t.Logf("%-45s %4d MiB %6d ms CPU  %s", b.name, peak>>10, cpu.Milliseconds(), labels.ReplaceAllString(reason, ""))
		switch {
		case b.want == "" && reason != "<nil>":
			t.Errorf("%s: %s", b.name, reason)
		case b.want != "" && (string(f[2]) != string(banger.CodeInvalid) || !strings.Contains(reason, b.want) || !strings.HasPrefix(reason, `image "`)):
			t.Errorf("%s: %s, want %q", b.name, reason, b.want)
		}
		if cpu > bombLimitCPU {
			t.Errorf("%s: %s of CPU", b.name, cpu)
		}
		if peak > 384<<10 {
			t.Errorf("%s: %d MiB resident", b.name, peak>>10)
		}
		worst = max(worst, peak>>10)
		_, s := openStore(t, filepath.Join(dir, "state"))
		if b.want == "" {
			taken++
		} else {
			refused++
			nothing(t, s)
		}
		if left := inside(t, s, "tmp"); left != nil {
			t.Errorf("%s: tmp/ has %q", b.name, left)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d bombs refused, %d images at the limit taken; at most %d MiB resident", refused, taken, worst)
}
