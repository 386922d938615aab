// Program unpack gets one layer from a registry and does with it what a
// contender of the benchmark does. It is built in a module of its own, since
// tar2ext4 is a library of another project.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

const usage = "usage: unpack nowhere|model|tar2ext4 URL DIGEST DIFFID gzip|zstd OUT"

func main() {
	if len(os.Args) != 7 {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5], os.Args[6]); err != nil {
		fmt.Fprintln(os.Stderr, "unpack:", err)
		os.Exit(1)
	}
}

// run checks both digests in every mode but nowhere, which only inflates.
func run(mode, url, digest, diffID, compression, out string) error {
	resp, err := http.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	packed, unpacked := sha256.New(), sha256.New()
	var body io.Reader = bufio.NewReaderSize(resp.Body, 1<<20)
	if mode != "nowhere" {
		body = bufio.NewReaderSize(io.TeeReader(resp.Body, packed), 1<<20)
	}
	var r io.Reader
	switch compression {
	case "gzip":
		r, err = gzip.NewReader(body)
	case "zstd":
		r, err = zstd.NewReader(body, zstd.WithDecoderConcurrency(1))
	default:
		err = fmt.Errorf("what is %s", compression)
	}
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	if mode == "nowhere" {
		_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf)
		return err
	}
	f, err := os.OpenFile(out, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	switch mode {
	case "model": // every byte is written once, as it comes
		_, err = io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(unpacked, f)}, struct{ io.Reader }{r}, buf)
	case "tar2ext4":
		r = io.TeeReader(r, unpacked)
		if err = tar2ext4.ConvertTarToExt4(r, f, tar2ext4.MaximumDiskSize(64<<30)); err == nil {
			_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, r, buf)
		}
	default:
		err = fmt.Errorf("%s", usage)
	}
	if err != nil {
		return err
	}
	// What follows the archive counts for the digest of what came.
	if _, err := io.Copy(io.Discard, body); err != nil {
		return err
	}
	for _, c := range []struct{ got, want string }{
		{"sha256:" + hex.EncodeToString(packed.Sum(nil)), digest},
		{"sha256:" + hex.EncodeToString(unpacked.Sum(nil)), diffID},
	} {
		if strings.TrimSpace(c.want) != c.got {
			return fmt.Errorf("digest %s, not %s", c.got, c.want)
		}
	}
	return f.Sync()
}
