// Package guestops is what a guest under test does when it is asked: one
// protocol for the fake and for the guest that is booted.
//
// A request is one line, "OP ARGUMENT"; the answer is one line, "ok TEXT" or
// "error TEXT". After the answer to echo, bytes come back as they are sent.
package guestops

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
)

// MaxLineBytes bounds a request and an answer.
const MaxLineBytes = 4096

// MarkerBytes is the length of the text a drive begins with, by which guests
// find it; WriteOffset is where write and read act, in bytes, and TrimOffset
// and TrimBytes what trim gives back.
const (
	MarkerBytes = 16
	WriteOffset = 4096
	TrimOffset  = 1 << 20
	TrimBytes   = 1 << 20
	SectorBytes = 512
)

// A Guest does the work. Off, Reboot, Panic and Hang are called after the
// answer was sent; the guest may well be gone before they return.
type Guest interface {
	Print(text string) // to the console
	Off()
	Reboot()
	Panic()
	Hang()                           // stop serving, for good, and go on running
	Restart()                        // end the agent's session and begin another
	OpenStream() error               // try to open a stream to the host: nil if the host took it
	Write(marker, text string) error // a sector of a drive, flushed
	Read(marker string) (text string, err error)
	Trim(marker string) error
	// Card names the network card, "MAC MTU", and has it send back every frame
	// that EchoFrame has an answer to.
	Card() (string, error)
	// Flood sends that many frames of the longest kind.
	Flood(frames int) error
}

// EtherType marks the frames of the suite: one that IEEE 802 leaves to
// experiments.
const EtherType = 0x88b5

const ethernetBytes = 14

// Frame is a frame of the suite.
func Frame(dst, src [6]byte, payload []byte) []byte {
	f := append(append(make([]byte, 0, ethernetBytes+len(payload)), dst[:]...), src[:]...)
	return append(append(f, EtherType>>8, EtherType&0xff), payload...)
}

// EchoFrame is what a card with that MAC answers to a frame: nil to what is
// not for it.
func EchoFrame(mac [6]byte, frame []byte) []byte {
	if len(frame) < ethernetBytes || [6]byte(frame) != mac || frame[12] != EtherType>>8 || frame[13] != EtherType&0xff {
		return nil
	}
	return Frame([6]byte(frame[6:]), mac, frame[ethernetBytes:])
}

// Serve answers requests on conn, which it closes. port is the service number
// that the stream was opened with.
func Serve(conn net.Conn, port uint32, g Guest) {
	defer conn.Close()
	r := bufio.NewReaderSize(conn, MaxLineBytes)
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return
		}
		op, arg, _ := strings.Cut(strings.TrimSuffix(string(line), "\n"), " ")
		text, err := "", error(nil)
		var then func()
		switch op {
		case "echo":
			fmt.Fprintln(conn, "ok")
			_, _ = io.Copy(conn, r)
			return
		case "port":
			text = strconv.FormatUint(uint64(port), 10)
		case "print":
			g.Print(arg + "\n")
		case "flood":
			err = flood(g, arg)
		case "off":
			then = g.Off
		case "reboot":
			then = g.Reboot
		case "panic":
			then = g.Panic
		case "hang":
			then = g.Hang
		case "restart":
			then = g.Restart
		case "open":
			err = g.OpenStream()
		case "write":
			marker, body, _ := strings.Cut(arg, " ")
			err = g.Write(marker, body)
		case "read":
			text, err = g.Read(arg)
		case "trim":
			err = g.Trim(arg)
		case "card":
			text, err = g.Card()
		case "frames":
			var n int
			if n, err = strconv.Atoi(arg); err == nil {
				err = g.Flood(n)
			}
		default:
			err = fmt.Errorf("unknown request %q", op)
		}
		answer := "ok " + text
		if err != nil {
			answer = "error " + strings.ReplaceAll(err.Error(), "\n", " ")
		}
		if _, err := fmt.Fprintln(conn, answer); err != nil {
			return
		}
		if then != nil {
			then()
		}
	}
}

// flood prints lines of 64 bytes until at least that many bytes are out.
func flood(g Guest, arg string) error {
	n, err := strconv.Atoi(arg)
	if err != nil {
		return err
	}
	for i := 0; i < n; i += 64 {
		g.Print(fmt.Sprintf("flood %056d\n", i/64))
	}
	return nil
}

// Ask sends one request and returns the text of the answer. r must be the one
// reader of conn.
func Ask(conn net.Conn, r *bufio.Reader, request string) (string, error) {
	if _, err := fmt.Fprintln(conn, request); err != nil {
		return "", err
	}
	line, err := r.ReadString('\n')
	if err != nil {
		return "", err
	}
	verdict, text, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
	if verdict != "ok" {
		return "", fmt.Errorf("guest: %s", text)
	}
	return text, nil
}
