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

// exampleImage makes an image of 64 MiB with one file in it.
func exampleImage(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w, err := ext4.NewWriter(f, ext4.Options{})
	if err != nil {
		return err
	}
	hosts := "127.0.0.1 localhost\n"
	c, err := w.Place(strings.NewReader(hosts), int64(len(hosts)))
	if err != nil {
		return err
	}
	return errors.Join(
		w.Add("etc", &ext4.Inode{Mode: 0o040755}),
		w.Add("etc/hosts", &ext4.Inode{Mode: 0o100644, Content: c}),
		w.Finish(ext4.Params{SizeBytes: 64 << 20, UUID: [16]byte{0xc0, 0xff, 0xee}}),
	)
}

func ExampleOpen() {
	dir, err := os.MkdirTemp("", "ext4-example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	image := filepath.Join(dir, "root.img")
	if err := exampleImage(image); err != nil {
		fmt.Println(err)
		return
	}

	f, err := os.Open(image)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer f.Close()
	fsys, err := ext4.Open(f)
	if err != nil {
		fmt.Println(err)
		return
	}
	err = fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Println(info.Mode(), info.Sys().(*ext4.Stat).UID, path)
		return nil
	})
	if err != nil {
		fmt.Println(err)
	}
	// Output:
	// drwxr-xr-x 0 .
	// drwxr-xr-x 0 etc
	// -rw-r--r-- 0 etc/hosts
	// drwx------ 0 lost+found
}

func ExampleEdit() {
	dir, err := os.MkdirTemp("", "ext4-example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	image, before := filepath.Join(dir, "root.img"), filepath.Join(dir, "before.img")
	ctx := context.Background()
	if err := errors.Join(exampleImage(image), ext4.CopyFile(ctx, before, image)); err != nil {
		fmt.Println(err)
		return
	}

	motd := "hello\n"
	err = ext4.Edit(ctx, image, time.Unix(1700000000, 0), func(e *ext4.Editor) error {
		return errors.Join(
			e.Put("etc/motd", &ext4.Inode{Mode: 0o100644}, strings.NewReader(motd), int64(len(motd))),
			e.Chmod("etc/hosts", 0o600),
		)
	})
	if err != nil {
		fmt.Println(err)
		return
	}

	// What has changed?
	var trees [2]*ext4.FS
	for i, path := range []string{image, before} {
		f, err := os.Open(path)
		if err != nil {
			fmt.Println(err)
			return
		}
		defer f.Close()
		if trees[i], err = ext4.Open(f); err != nil {
			fmt.Println(err)
			return
		}
	}
	err = ext4.Compare(trees[0], trees[1], ext4.DiffAll&^ext4.DiffMtime, func(d ext4.Difference) bool {
		fmt.Println(d)
		return true
	})
	if err != nil {
		fmt.Println(err)
	}
	// Output:
	// "etc/hosts": mode: 0600, not 0644
	// "etc/motd": name: there, not missing
}
