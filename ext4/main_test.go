//go:build linux

package ext4

import (
	"os"
	"testing"

	"banger/ext4/internal/e2fs"
)

func TestMain(m *testing.M) { os.Exit(e2fs.Main(m)) }
