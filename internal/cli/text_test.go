package cli

import (
	"bytes"
	"math"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"banger"
	"banger/internal/api"
)

func TestParseSize(t *testing.T) {
	for _, c := range []struct {
		text string
		want int64 // 0: refused
	}{
		{"1", 1}, {"1B", 1}, {"1k", 1 << 10}, {"1K", 1 << 10}, {"1KB", 1 << 10}, {"1KiB", 1 << 10}, {"1kib", 1 << 10},
		{"512M", 512 << 20}, {"8G", 8 << 30}, {"3T", 3 << 40}, {"007", 7},
		{"1023", 1023}, {"1024", 1024},
		{"4611686018427387904", 1 << 62}, {"4611686018427387905", 0},
		{"4194304T", 1 << 62}, {"4194305T", 0}, {"4294967296G", 1 << 62}, {"4294967297G", 0},
		{"9223372036854775807", 0}, {"9223372036854775808", 0}, {"99999999999999999999T", 0},
		{"", 0}, {"0", 0}, {"0G", 0}, {"-1", 0}, {"-1G", 0},
		{"G", 0}, {"B", 0}, {"iB", 0}, {"1iB", 0}, {"1BK", 0}, {"1KK", 0}, {"1GBB", 0}, {"1P", 0}, {"1E", 0},
		{"1.5G", 0}, {"1,5G", 0}, {"1e3", 0}, {"0x10", 0}, {"1_000", 0}, {" 1", 0}, {"1 ", 0}, {"1 G", 0}, {"1G\n", 0},
		{"\u0250", 0}, {"1\u0250", 0}, {"1\u212a", 0}, {"\u0661", 0}, {"1\xff", 0}, {"\x00", 0},
	} {
		got, err := parseSize(c.text)
		if c.want == 0 {
			if err == nil {
				t.Errorf("%q: read as %d", c.text, got)
			}
			continue
		}
		if err != nil || got != c.want {
			t.Errorf("%q: %d, %v; want %d", c.text, got, err, c.want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"1G", "512MiB", "\u0250", "-", "9223372036854775807T"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := parseSize(s); err == nil && (n <= 0 || n > 1<<62) {
			t.Errorf("%q: %d", s, n)
		}
	})
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1: "1 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 99 << 10: "99.0 KiB", 100 << 10: "100 KiB",
		1 << 20: "1.0 MiB", 16 << 30: "16.0 GiB", 1 << 40: "1.0 TiB", 1 << 50: "1024 TiB",
	} {
		if got := size(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("BANGER_TEST_SET", "a=b c")
	t.Setenv("BANGER_TEST_EMPTY", "")
	os.Unsetenv("BANGER_TEST_UNSET")
	for _, c := range []struct {
		in, want []string // nil want: refused
	}{
		{[]string{}, []string{}},
		{[]string{"A=1", "B=", "C==", "A=2"}, []string{"A=1", "B=", "C==", "A=2"}},
		{[]string{"BANGER_TEST_SET"}, []string{"BANGER_TEST_SET=a=b c"}},
		{[]string{"BANGER_TEST_EMPTY"}, []string{"BANGER_TEST_EMPTY="}},
		{[]string{"BANGER_TEST_UNSET", "A=1"}, []string{"A=1"}},
		{[]string{"A=\x00\n"}, []string{"A=\x00\n"}},
		{[]string{""}, nil},
		{[]string{"A=1", "=x"}, nil},
	} {
		got, err := environment(c.in)
		if (err == nil) != (c.want != nil) || !slices.Equal(got, c.want) {
			t.Errorf("%q: %q, %v; want %q", c.in, got, err, c.want)
		}
		if err != nil && banger.CodeOf(err) != banger.CodeUsage {
			t.Errorf("%q: code %s", c.in, banger.CodeOf(err))
		}
	}
}

func TestEscape(t *testing.T) {
	for _, plain := range []string{
		"", "debian:bookworm", "é日本語 ∑", `\x1b`, `"quoted" 'n' $(x) %s`, "\ufffd", strings.Repeat("x", 100_000),
	} {
		if got := escape(plain); got != plain {
			t.Errorf("%.50q became %.50q", plain, got)
		}
	}
	for in, want := range map[string]string{
		"\x1b[31mred\x1b[0m":     `\x1b[31mred\x1b[0m`,
		"\x1b]0;title\x07":       `\x1b]0;title\a`,
		"\x1b]8;;http://x\x1b\\": `\x1b]8;;http://x\x1b\`,
		"a\r\nb\tc\bd\x00":       `a\r\nb\tc\bd\x00`,
		"\u009b31m":              `\u009b31m`, // C1: CSI
		"\x9b31m":                `\x9b31m`,   // the same, as a byte
		"a\u202eb\u2066c\u200f":  `a\u202eb\u2066c\u200f`,
		"\u2028\u2029\u00a0":     `\u2028\u2029\u00a0`,
		"\ufeff\u200b":           `\ufeff\u200b`,
		"\U000e0041":             `\U000e0041`, // a tag character
		"\xff\xfe":               `\xff\xfe`,
		"\xef":                   `\xef`, // begins a replacement character and is none
		"\xef\xbf":               `\xef\xbf`,
		"\xef\xbf\xbd\xef":       "\ufffd\\xef",
		"\xed\xa0\x80":           `\xed\xa0\x80`, // a surrogate
		"\xc0\x80":               `\xc0\x80`,
		"é\x01":                  `é\x01`,
	} {
		if got := escape(in); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
	for b := range 256 {
		in := string([]byte{byte(b)})
		if got := escape(in); (got == in) != (b >= 0x20 && b < 0x7f) || !safe(got) {
			t.Errorf("byte %#02x became %q", b, got)
		}
	}
	for r := range rune(0x3000) {
		if got := escape(string(r)); !safe(got) || unicode.IsPrint(r) && got != string(r) {
			t.Errorf("%U became %q", r, got)
		}
	}
}

// safe says whether a terminal shows text as text.
func safe(s string) bool {
	for _, r := range s {
		if unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Cs, unicode.Co) {
			return false
		}
	}
	return utf8.ValidString(s)
}

func FuzzEscape(f *testing.F) {
	for _, s := range []string{"plain", "\x1b]0;x\x07", "\xef\xbf", "\u202e", "\xff\ufffd"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		out := escape(s)
		if !safe(out) {
			t.Errorf("%q became %q", s, out)
		}
		if again := escape(out); again != out {
			t.Errorf("%q escaped twice is %q", s, again)
		}
		if safe(s) && strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 && out != s {
			t.Errorf("plain %q became %q", s, out)
		}
	})
}

func TestSafeSeesControl(t *testing.T) {
	for _, s := range []string{"\x1b", "\x7f", "\u009b", "\u202e", "\xff", "\u2028"} {
		if safe(s) {
			t.Errorf("%q passes", s)
		}
	}
}

func TestProgressLines(t *testing.T) {
	var b bytes.Buffer
	p := &progress{w: &b, cols: 80}
	for _, done := range []int64{0, 10, 4096} {
		p.event(api.Event{Progress: &api.Progress{Step: "fetch", Subject: "a\x1b[2J", DoneBytes: done, TotalBytes: 4096}})
	}
	p.event(api.Event{Notice: "slow\x07"})
	p.event(api.Event{Progress: &api.Progress{Step: "build", Subject: "x"}})
	p.event(api.Event{Stage: &api.Stage{Name: "pull", StartUs: 0, EndUs: 1500}})
	p.event(api.Event{Stage: &api.Stage{Name: "boot", StartUs: 1500, EndUs: 3000}})
	p.end()
	if want := "fetch a\\x1b[2J (4.0 KiB)\nbanger: slow\\a\nbuild x\n"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
	b.Reset()
	p.waterfall(false)
	bar := strings.Repeat("#", 20)
	if want := "pull               1.5 ms  |" + bar + strings.Repeat(" ", 20) + "|\n" +
		"boot               1.5 ms  |" + strings.Repeat(" ", 20) + bar + "|\n"; b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
	b.Reset()
	p.waterfall(true)
	if want := `{"name":"pull","start_us":0,"end_us":1500}` + "\n" + `{"name":"boot","start_us":1500,"end_us":3000}` + "\n"; b.String() != want {
		t.Errorf("got %q", b.String())
	}
}

func TestProgressOnTerminal(t *testing.T) {
	var b bytes.Buffer
	p := &progress{w: &b, cols: 20, tty: true}
	p.event(api.Event{Progress: &api.Progress{Step: "fetch", Subject: strings.Repeat("é", 100), DoneBytes: 1}})
	if want := "\r\x1b[Kfetch " + strings.Repeat("é", 5) + "...  1 B"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
	b.Reset()
	p.event(api.Event{Notice: "n"})
	p.end()
	p.end()
	if want := "\r\x1b[Kbanger: n\n"; b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

func TestFit(t *testing.T) {
	for _, c := range []struct {
		subject, far string
		cols         int
		want         string
	}{
		{"fetch x", "  1 B", 12, "fetch x  1 B"},
		{"fetch xy", "  1 B", 12, "fetc...  1 B"},
		{"fétch xy", "  1 B", 12, "fétc...  1 B"},
		{"fetch", "", 5, "fetch"},
		{"fetch", "", 4, "f..."},
		{"fetch", "  1 B", 8, "...  1 B"},
		{"fetch", "  1 B", 7, "...  1 "},
		{"fetch", "  1 B", 2, ".."},
		{"fetch", "  1 B", 0, ""},
	} {
		if got := fit(c.subject, c.far, c.cols); got != c.want {
			t.Errorf("%q and %q in %d columns: %q, want %q", c.subject, c.far, c.cols, got, c.want)
		}
	}
}

// TestProgressRate fetches two layers, whose bytes are counted in one: the rate
// is that of the fetching, not all bytes by the time of the last layer. A step
// that begins with bytes that were there does not count them.
func TestProgressRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		p := &progress{w: &b, cols: 80, tty: true}
		at := func(step, subject string, doneMiB int64) string {
			b.Reset()
			p.event(api.Event{Progress: &api.Progress{Step: step, Subject: subject, DoneBytes: doneMiB << 20, TotalBytes: 100 << 20}})
			return strings.TrimPrefix(b.String(), "\r\x1b[K")
		}
		at("fetch", "a", 0)
		time.Sleep(4 * time.Second)
		if got, want := at("fetch", "a", 40), "fetch a  40.0 MiB of 100 MiB  10.0 MiB/s"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
		at("fetch", "b", 40)
		time.Sleep(time.Second)
		if got, want := at("fetch", "b", 60), "fetch b  60.0 MiB of 100 MiB  12.0 MiB/s"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
		at("export", "b", 50)
		time.Sleep(time.Second)
		if got, want := at("export", "b", 51), "export b  51.0 MiB of 100 MiB  1.0 MiB/s"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
		at("export", "c", 0) // from the beginning
		time.Sleep(time.Second)
		if got, want := at("export", "c", 3), "export c  3.0 MiB of 100 MiB  3.0 MiB/s"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	})
}

// Whatever order credit comes in, just what was given is taken.
func TestCredit(t *testing.T) {
	var c credit
	const first, given, takers = 100, 1000, 4
	c.init(first)
	if got := c.take(math.MaxInt); got != first {
		t.Fatalf("took %d of %d", got, first)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	total := 0
	for range takers {
		wg.Go(func() {
			for {
				n := c.take(7)
				if n < 1 || n > 7 {
					t.Errorf("took %d, wanted 1 to 7", n)
				}
				mu.Lock()
				total += n
				over := total >= given
				mu.Unlock()
				if over {
					c.add(takers) // so that the others see the end too
					return
				}
			}
		})
	}
	for range given {
		c.add(1)
	}
	wg.Wait()
	// Of what the ends added, some may have been taken too.
	if left := c.n; left < 0 || total+left != given+takers*takers {
		t.Errorf("given %d, taken %d, left %d", given+takers*takers, total, left)
	}
}

func TestLastLines(t *testing.T) {
	for _, c := range []struct {
		text string
		n    int
		want string
	}{
		{"", 0, ""}, {"", 1, ""}, {"a", 0, ""}, {"a", 1, "a"}, {"a", 2, "a"}, {"a\n", 0, ""}, {"a\n", 1, "a\n"},
		{"a\nb\n", 1, "b\n"}, {"a\nb\n", 2, "a\nb\n"}, {"a\nb\n", 3, "a\nb\n"}, {"a\nb", 1, "b"}, {"a\n\n", 1, "\n"}, {"\n", 1, "\n"},
	} {
		if got := string(lastLines([]byte(c.text), c.n)); got != c.want {
			t.Errorf("%d of %q: %q, want %q", c.n, c.text, got, c.want)
		}
	}
}
