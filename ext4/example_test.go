package ext4_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"banger/ext4"
)

func Example() {
	dir, err := os.MkdirTemp("", "ext4-example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	f, err := os.Create(filepath.Join(dir, "root.img"))
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()

	w, err := ext4.NewWriter(f, ext4.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	hello := "#!/bin/sh\necho hello\n"
	content, err := w.Place(strings.NewReader(hello), int64(len(hello)))
	if err != nil {
		fmt.Println(err)
		return
	}
	script := &ext4.Inode{Mode: 0o100755, Content: content, Xattrs: map[string][]byte{"user.origin": []byte("example")}}
	p := ext4.Params{
		SizeBytes: 64 << 20,
		UUID:      [16]byte{0xc0, 0xff, 0xee},
		Label:     "example",
		Time:      time.Unix(1700000000, 0),
	}
	err = errors.Join(
		w.Add("bin", &ext4.Inode{Mode: 0o040755}),
		w.Add("bin/hello", script),
		w.Add("bin/hi", script), // a hard link
		w.Add("sbin", &ext4.Inode{Mode: 0o120777, Target: "bin"}),
		w.Finish(p),
	)
	if err != nil {
		fmt.Println(err)
		return
	}
	info, err := f.Stat()
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(info.Size(), content.SizeBytes())
	// Output: 67108864 21
}

func ExampleCopyFile() {
	dir, err := os.MkdirTemp("", "ext4-example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	template, disk := filepath.Join(dir, "template.img"), filepath.Join(dir, "disk.img")
	f, err := os.Create(template)
	if err != nil {
		fmt.Println(err)
		return
	}
	err = ext4.Format(f, ext4.Params{SizeBytes: 1 << 30, UUID: [16]byte{0xc0, 0xff, 0xee}}, nil)
	if err := errors.Join(err, f.Close()); err != nil {
		fmt.Println(err)
		return
	}

	ctx := context.Background()
	fmt.Println(ext4.CopyFile(ctx, disk, template))
	again := ext4.CopyFile(ctx, disk, template)
	fmt.Println(errors.Is(again, fs.ErrExist))
	// Output:
	// <nil>
	// true
}
