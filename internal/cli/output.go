package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
	"unicode"

	"golang.org/x/term"

	"banger"
	"banger/internal/api"
)

// escape makes text from an image, a guest or a registry safe for a terminal:
// control characters, and the ones that turn the direction of text, are shown
// as Go would write them. Line ends are the caller's business.
func escape(s string) string {
	plain := true
	for _, r := range s {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			plain = false
			break
		}
	}
	if plain {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == unicode.ReplacementChar && !strings.HasPrefix(s[i:], string(r)): // a byte that is no UTF-8
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			q := fmt.Sprintf("%+q", r)
			b.WriteString(q[1 : len(q)-1])
		}
	}
	return b.String()
}

// printError prints one line, the lines that go with it, and the next step.
func printError(w io.Writer, err error) {
	fmt.Fprintf(w, "banger: %s\n", escape(err.Error()))
	var e *banger.Error
	if !errors.As(err, &e) {
		return
	}
	if e.Detail != "" {
		for line := range strings.SplitSeq(e.Detail, "\n") {
			fmt.Fprintf(w, "  | %s\n", escape(line))
		}
	}
	if e.Hint != "" {
		fmt.Fprintf(w, "hint: %s\n", escape(e.Hint))
	}
}

// printJSON prints one document.
func printJSON(v any) error {
	enc := json.NewEncoder(os.Stdout)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// table prints rows in columns; the first row is the head, and a row may end
// early. Cells are escaped.
func table(rows [][]string) error {
	var b bytes.Buffer
	tw := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	for _, row := range rows {
		// A cell that is missing would end its column here.
		for i := range max(len(rows[0]), len(row)) {
			if i > 0 {
				fmt.Fprint(tw, "\t")
			}
			if i < len(row) {
				fmt.Fprint(tw, escape(row[i]))
			}
		}
		fmt.Fprintln(tw)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	var out strings.Builder
	for line := range strings.Lines(b.String()) {
		fmt.Fprintln(&out, strings.TrimRight(line, " \n"))
	}
	_, err := os.Stdout.WriteString(out.String())
	return err
}

// size writes bytes as people read them, in powers of 1024.
func size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, u := float64(n), 0
	for f >= 1024 && u < len(units)-1 {
		f /= 1024
		u++
	}
	if u == 0 || f >= 100 {
		return fmt.Sprintf("%.0f %s", f, units[u])
	}
	return fmt.Sprintf("%.1f %s", f, units[u])
}

// progress shows how far a call is: on a terminal one line that changes, else
// one plain line for each new step or subject.
type progress struct {
	w    io.Writer
	tty  bool
	cols int

	mu      sync.Mutex
	last    api.Progress
	since   time.Time // of the step, whatever its subjects
	from    int64     // bytes that were done then
	painted bool      // the terminal's last line is ours
	stages  []api.Stage
	origin  time.Time // of the stages' times: the start of the first call
}

// events gives the handler of the events of a call that started then.
func (p *progress) events(start time.Time) func(api.Event) {
	p.mu.Lock()
	if p.origin.IsZero() {
		p.origin = start
	}
	shift := start.Sub(p.origin).Microseconds()
	p.mu.Unlock()
	return func(e api.Event) {
		if e.Stage != nil {
			e.Stage.StartUs += shift
			e.Stage.EndUs += shift
		}
		p.event(e)
	}
}

func newProgress(f *os.File) *progress {
	p := &progress{w: f, cols: 80}
	if term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" {
		p.tty = true
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 20 {
			p.cols = w
		}
	}
	return p
}

func (p *progress) event(e api.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case e.Progress != nil:
		p.progress(*e.Progress)
	case e.Stage != nil:
		p.stages = append(p.stages, *e.Stage)
	case e.Notice != "":
		p.clear()
		fmt.Fprintf(p.w, "banger: %s\n", escape(e.Notice))
	}
}

func (p *progress) progress(g api.Progress) {
	now := time.Now()
	if g.Step != p.last.Step || g.DoneBytes < p.last.DoneBytes {
		p.since, p.from = now, g.DoneBytes
	}
	another := g.Step != p.last.Step || g.Subject != p.last.Subject
	p.last = g
	line := escape(g.Step + " " + g.Subject)
	if !p.tty {
		if !another {
			return
		}
		if g.TotalBytes > 0 {
			line += " (" + size(g.TotalBytes) + ")"
		}
		fmt.Fprintln(p.w, line)
		return
	}
	far := ""
	if g.DoneBytes > 0 {
		far = "  " + size(g.DoneBytes)
		if g.TotalBytes > 0 {
			far += " of " + size(g.TotalBytes)
		}
		if d := now.Sub(p.since); d > 200*time.Millisecond {
			far += fmt.Sprintf("  %s/s", size(int64(float64(g.DoneBytes-p.from)/d.Seconds())))
		}
	}
	fmt.Fprintf(p.w, "\r\x1b[K%s", fit(line, far, p.cols-1))
	p.painted = true
}

// fit makes a line of at most so many columns: of what is long the subject is
// cut, which is a digest as a rule, and not how far it is.
func fit(subject, far string, cols int) string {
	const cut = "..."
	if r := []rune(subject); len(r)+len(far) > cols {
		subject = string(r[:max(0, cols-len(far)-len(cut))]) + cut
	}
	line := []rune(subject + far)
	return string(line[:min(len(line), cols)])
}

func (p *progress) clear() {
	if p.painted {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.painted = false
	}
}

// end takes the changing line away.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}

// waterfall prints where the time went.
func (p *progress) waterfall(asJSON bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if asJSON {
		enc := json.NewEncoder(p.w)
		for _, s := range p.stages {
			enc.Encode(s)
		}
		return
	}
	const width = 40
	var total int64 = 1
	for _, s := range p.stages {
		total = max(total, s.EndUs)
	}
	for _, s := range p.stages {
		from := int(s.StartUs * width / total)
		to := max(from+1, int((s.EndUs*width+total-1)/total))
		bar := strings.Repeat(" ", from) + strings.Repeat("#", to-from)
		fmt.Fprintf(p.w, "%-12s %9.1f ms  |%-*s|\n", s.Name, float64(s.EndUs-s.StartUs)/1000, width, bar)
	}
}
