package store

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
)

type sample struct {
	Name  string   `json:"name"`
	Sizes []int64  `json:"sizes,omitempty"`
	Tags  []string `json:"tags"`
}

func TestRecordRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.json")
	for _, want := range []sample{
		{},
		{Name: "a", Sizes: []int64{0, -1, 1<<63 - 1}, Tags: []string{"<&>", "\u202e", "\n"}},
	} {
		if err := WriteJSON(path, 3, want); err != nil {
			t.Fatal(err)
		}
		var got sample
		if err := ReadJSON(path, 3, &got); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("wrote %+v, read %+v, %v", want, got, err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if err := WriteJSON(path, 3, struct{}{}); err != nil {
		t.Error(err)
	}
	var got sample
	if err := ReadJSON(path, 3, &got); err != nil {
		t.Errorf("a record with no fields: %v", err)
	}
}

func TestWriteJSONRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "vm.json")
	if err := WriteJSON(path, 1, sample{Name: "kept"}); err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]any{
		"a list": []int{1}, "a number": 1, "null": nil, "a nil map": map[string]int(nil), "a channel": make(chan int),
	} {
		if err := WriteJSON(path, 1, v); err == nil {
			t.Errorf("%s was written", name)
		}
	}
	var got sample
	if err := ReadJSON(path, 1, &got); err != nil || got.Name != "kept" {
		t.Errorf("the record is now %+v, %v", got, err)
	}
	wantNames(t, dir, "vm.json")
}

// The largest record that can be written can be read.
func TestRecordLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.json")
	if err := WriteJSON(path, 1, sample{}); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	room := maxRecordBytes - int(st.Size())
	for _, c := range []struct {
		name string
		n    int
		ok   bool
	}{{"limit", room, true}, {"limit+1", room + 1, false}} {
		err := WriteJSON(path, 1, sample{Name: strings.Repeat("x", c.n)})
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
		var got sample
		if err := ReadJSON(path, 1, &got); err != nil {
			t.Errorf("%s: what stands there cannot be read: %v", c.name, err)
		}
	}
}

func TestReadJSONRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		name, content string
		schema        bool // it must be ErrSchema
	}{
		{"empty", "", false},
		{"white space", " \n", false},
		{"zeros, as after a power cut", strings.Repeat("\x00", 4096), false},
		{"garbage", "\xff\xfe{", false},
		{"cut short", `{"schema":2,"name":"a`, false},
		{"cut before the last brace", `{"schema":2,"name":"a"`, false},
		{"more behind it", `{"schema":2,"name":"a"}{}`, false},
		{"a list", `[]`, false},
		{"null", `null`, true},
		{"no schema", `{"name":"a"}`, true},
		{"older", `{"schema":1,"name":"a"}`, true},
		{"newer", `{"schema":3,"name":"a"}`, true},
		{"newer, of another shape", `{"schema":3,"name":{"first":"a"}}`, true},
		{"a schema that is text", `{"schema":"2"}`, false},
		{"a schema out of range", `{"schema":1e99}`, false},
		{"a field of the wrong type", `{"schema":2,"name":7}`, false},
		{"limit+1, whole but for its length", `{"schema":2}` + strings.Repeat(" ", maxRecordBytes+1-len(`{"schema":2}`)), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(dir, "r.json")
			if err := os.WriteFile(path, []byte(c.content), 0o600); err != nil {
				t.Fatal(err)
			}
			var got sample
			err := ReadJSON(path, 2, &got)
			if err == nil {
				t.Fatalf("it was read as %+v", got)
			}
			if errors.Is(err, ErrSchema) != c.schema || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("got %v", err)
			}
			if !strings.Contains(err.Error(), path) {
				t.Errorf("%q does not name the file", err)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		if err := ReadJSON(filepath.Join(dir, "none"), 2, &sample{}); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a folder", func(t *testing.T) {
		if err := ReadJSON(dir, 2, &sample{}); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
}

// tornReads rewrites a file while it is read, and counts reads that found
// neither the old content nor the new one.
func tornReads(t *testing.T, rewrites int, write func(path string, data []byte) error) (torn int) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "r")
	contents := [][]byte{bytes.Repeat([]byte("a"), 100_000), bytes.Repeat([]byte("b"), 50_000)}
	if err := write(path, contents[0]); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got, contents[0]) && !bytes.Equal(got, contents[1]) {
				torn++
			}
		}
	})
	for i := range rewrites {
		if err := write(path, contents[i%2]); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	wg.Wait()
	wantNames(t, filepath.Dir(path), "r")
	return torn
}

func TestWriteFileIsAtomic(t *testing.T) {
	const rewrites = 1000
	if n := tornReads(t, rewrites, func(p string, d []byte) error { return WriteFile(p, d, 0o600) }); n != 0 {
		t.Errorf("%d reads found half a file", n)
	}
	// The same reader sees what a plain write does.
	if n := tornReads(t, rewrites, func(p string, d []byte) error { return os.WriteFile(p, d, 0o600) }); n == 0 {
		t.Error("the reader never saw half a file even of a writer that truncates")
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, perm := range []fs.FileMode{0o600, 0o644, 0o400} {
		if err := WriteFile(path, []byte("x"), perm); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != perm {
			t.Errorf("mode %v, want %v", st.Mode(), perm)
		}
	}
	// Over a symlink it is the link that is replaced.
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(victim, link); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(link, []byte("y"), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(victim); string(data) != "mine" {
		t.Errorf("a symlink was written through: %q", data)
	}
	// Where the name cannot be taken nothing stays.
	taken := filepath.Join(dir, "taken")
	if err := os.MkdirAll(filepath.Join(taken, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(taken, []byte("x"), 0o600); err == nil {
		t.Error("a folder was replaced by a file")
	}
	wantNames(t, dir, "f", "link", "taken")
	if err := WriteFile(filepath.Join(dir, "none", "f"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a folder that is not there: %v", err)
	}
}

// Twenty writers of one record: every read finds a whole one, the last stands.
func TestRecordWriters(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "vm.json")
	if err := WriteJSON(path, 1, sample{Name: "0", Sizes: []int64{0}}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			for j := range 10 {
				n := int64(i*10 + j)
				if err := WriteJSON(path, 1, sample{Name: strings.Repeat("x", int(n)), Sizes: []int64{n}}); err != nil {
					t.Error(err)
				}
				var got sample
				if err := ReadJSON(path, 1, &got); err != nil {
					t.Error(err)
				} else if got.Name != "0" && int64(len(got.Name)) != got.Sizes[0] {
					t.Errorf("a record of two halves: %d and %d", len(got.Name), got.Sizes[0])
				}
			}
		})
	}
	wg.Wait()
	wantNames(t, dir, "vm.json")
}
