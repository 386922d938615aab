// Program prog is the one static binary of the smallest image there is.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"sort"
	"strconv"
	"strings"
	"time"
)

func main() {
	args := os.Args[1:]
	if len(args) == 0 {
		args = []string{"hello"}
	}
	switch args[0] {
	case "hello":
		fmt.Println("hello from", os.Args[0])
	case "cat":
		io.Copy(os.Stdout, os.Stdin)
	case "exit":
		code, _ := strconv.Atoi(args[1])
		os.Exit(code)
	case "env":
		env := os.Environ()
		sort.Strings(env)
		fmt.Println(strings.Join(env, "\n"))
	case "id":
		wd, _ := os.Getwd()
		fmt.Println("uid", os.Getuid(), "gid", os.Getgid(), "in", wd)
	case "ls":
		entries, err := os.ReadDir(args[1])
		check(err)
		for _, e := range entries {
			fmt.Println(e.Name())
		}
	case "keep":
		f, err := os.Create(args[1])
		if err == nil {
			_, err = io.Copy(f, os.Stdin)
		}
		if err == nil {
			err = f.Sync()
		}
		check(err)
	case "show":
		b, err := os.ReadFile(args[1])
		check(err)
		os.Stdout.Write(b)
	case "net":
		netMain(args[1:])
	case "listen":
		l, err := net.Listen("tcp", ":8000")
		check(err)
		for {
			c, err := l.Accept()
			check(err)
			fmt.Fprint(c, "HTTP/1.0 200 OK\r\n\r\nhello from ", os.Args[0], "\n")
			c.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, c)
			c.Close()
		}
	case "sleep":
		fmt.Println("sleeping")
		time.Sleep(time.Hour)
	default:
		fmt.Fprintln(os.Stderr, "what is", args[0])
		os.Exit(2)
	}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
