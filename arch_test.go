package banger_test

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// rooms is the import table: what each package of the project may import of
// the project, and why no more. A package that is not here does not belong.
var rooms = map[string]struct {
	may []string
	why string
}{
	"banger":                                {nil, "the nouns have no behaviour"},
	"banger/ext4":                           {[]string{"banger/ext4/internal/disk"}, "a public library of its own"},
	"banger/ext4/internal/disk":             {nil, "on-disk structures, no logic"},
	"banger/ext4/internal/e2fs":             {nil, "the test oracle must not share code with what it judges"},
	"banger/internal/wire":                  {nil, "it is part of the guest binary"},
	"banger/internal/apt":                   {nil, "it reads the host's files and judges nothing"},
	"banger/internal/store":                 {nil, "durability knows nothing of what it keeps"},
	"banger/internal/store/storetest":       {[]string{"banger/ext4"}, "it watches a store from outside, and no package imports it but in its tests"},
	"banger/internal/guest":                 {[]string{"banger/internal/wire"}, "it goes into every image: small and auditable"},
	"banger/internal/gzip":                  {nil, "it turns bytes into bytes"},
	"banger/internal/oci":                   {[]string{"banger", "banger/internal/apt", "banger/internal/gzip"}, "it hides the image specification, and knows no file system and no store"},
	"banger/internal/kernel":                {[]string{"banger", "banger/internal/apt", "banger/ext4", "banger/internal/store"}, "it makes the modules drive and keeps kernels"},
	"banger/internal/image":                 {[]string{"banger", "banger/ext4", "banger/internal/oci", "banger/internal/store"}, "it joins layers and file system, and knows no VM"},
	"banger/internal/vmm":                   {[]string{"banger"}, "the contract"},
	"banger/internal/vmm/vmmtest":           {[]string{"banger", "banger/internal/vmm", "banger/internal/wire", "banger/internal/vmm/vmmtest/guestops"}, "the fake speaks the guest's protocol"},
	"banger/internal/vmm/qemu":              {[]string{"banger", "banger/internal/vmm", "banger/internal/wire"}, "a driver must not own lifecycle"},
	"banger/internal/usernet":               {[]string{"banger"}, "a network knows its guest by its frames alone"},
	"banger/internal/proxy":                 {[]string{"banger"}, "it speaks two protocols and reaches nothing by itself"},
	"banger/internal/vm":                    {[]string{"banger", "banger/ext4", "banger/internal/kernel", "banger/internal/store", "banger/internal/vmm", "banger/internal/wire"}, "lifecycle sees the contract and no driver, base images and no image store"},
	"banger/internal/api":                   {[]string{"banger", "banger/internal/store", "banger/internal/wire"}, "types and transport only, and of the store the address of the daemon"},
	"banger/internal/doctor":                {[]string{"banger", "banger/internal/store", "banger/internal/vm", "banger/internal/vmm"}, "it looks at the host and at records, and changes nothing"},
	"banger/internal/cli":                   {[]string{"banger", "banger/internal/api", "banger/internal/wire"}, "two writers of one state folder is how VMs get lost"},
	"banger/internal/daemon":                {[]string{"banger", "banger/internal/api", "banger/internal/doctor", "banger/internal/image", "banger/internal/kernel", "banger/internal/oci", "banger/internal/proxy", "banger/internal/store", "banger/internal/usernet", "banger/internal/vm", "banger/internal/vmm", "banger/internal/vmm/qemu", "banger/internal/wire"}, "the one place where rooms are joined"},
	"banger/cmd/banger":                     {[]string{"banger/internal/cli"}, "wiring"},
	"banger/cmd/bangerd":                    {[]string{"banger/internal/daemon"}, "wiring"},
	"banger/cmd/banger-vsock-agent":         {[]string{"banger/internal/guest"}, "wiring"},
	"banger/internal/vmm/vmmtest/guestops":  {nil, "what the suite asks of a guest, fake or booted"},
	"banger/internal/vmm/vmmtest/testguest": {[]string{"banger/internal/wire", "banger/internal/vmm/vmmtest/guestops"}, "the guest of the conformance suite"},
	"banger/e2e":                            {nil, "it drives the binaries"},
}

// outside are dependencies that one package alone may import, and why.
var outside = map[string]struct {
	in  []string
	why string
}{
	"github.com/google/go-containerregistry": {[]string{"banger/internal/oci"}, "only oci knows registries"},
	"github.com/distribution/reference":      {[]string{"banger/internal/oci"}, "only oci knows references"},
	"github.com/ProtonMail/go-crypto":        {[]string{"banger/internal/kernel"}, "only kernel verifies archives"},
	"github.com/ulikunitz/xz":                {[]string{"banger/internal/kernel"}, "only kernel unpacks packages"},
	"github.com/pierrec/lz4":                 {[]string{"banger/internal/kernel"}, "only kernel unpacks kernels"},
	"github.com/klauspost/compress":          {[]string{"banger/internal/kernel", "banger/internal/oci"}, "only they unpack"},
	"github.com/hashicorp/yamux":             {[]string{"banger/internal/guest", "banger/internal/vmm/qemu", "banger/internal/vmm/vmmtest", "banger/internal/vmm/vmmtest/testguest"}, "only the two ends of the virtio-serial channel multiplex"},
	"github.com/spf13/cobra":                 {[]string{"banger/internal/cli"}, "only the command line parses flags"},
	"gvisor.dev/gvisor":                      {[]string{"banger/internal/usernet"}, "only usernet knows netstack"},
	"golang.org/x/net":                       {[]string{"banger/internal/usernet"}, "only usernet speaks DNS"},
	"golang.org/x/term":                      {[]string{"banger/internal/cli"}, "only the command line has a terminal"},
}

type pkg struct {
	ImportPath string
	Name       string
	Standard   bool
	Imports    []string
}

func list(t *testing.T, args ...string) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Name,Standard,Imports"}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	pkgs := map[string]pkg{}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs[p.ImportPath] = p
	}
}

func TestImports(t *testing.T) {
	for _, complaint := range complaints(list(t, "./...")) {
		t.Error(complaint)
	}
}

// complaints judges packages by the tables.
func complaints(pkgs map[string]pkg) (out []string) {
	for _, path := range slices.Sorted(maps.Keys(pkgs)) {
		room, ok := rooms[path]
		if !ok {
			out = append(out, path+": not in the table of rooms")
			continue
		}
		for _, imported := range pkgs[path].Imports {
			if imported == "banger" || strings.HasPrefix(imported, "banger/") {
				if !slices.Contains(room.may, imported) {
					out = append(out, path+" imports "+imported+": "+room.why)
				}
				continue
			}
			if path == "banger/ext4" || path == "banger/internal/wire" || path == "banger" {
				if strings.Contains(imported, ".") {
					out = append(out, path+" imports "+imported+": it has the standard library only")
				}
			}
			for dep, rule := range outside {
				if (imported == dep || strings.HasPrefix(imported, dep+"/")) && !slices.Contains(rule.in, path) {
					out = append(out, path+" imports "+imported+": "+rule.why)
				}
			}
		}
	}
	return out
}

// A check that cannot fail is none: each kind of rule is broken once.
func TestImportsComplains(t *testing.T) {
	for name, p := range map[string]pkg{
		"a room that nobody planned":   {ImportPath: "banger/internal/util"},
		"the CLI joining rooms":        {ImportPath: "banger/internal/cli", Imports: []string{"banger/internal/store"}},
		"a dependency in ext4":         {ImportPath: "banger/ext4", Imports: []string{"golang.org/x/sys/unix"}},
		"test support in the product":  {ImportPath: "banger/internal/kernel", Imports: []string{"banger/internal/store/storetest"}},
		"a dependency out of its room": {ImportPath: "banger/internal/vm", Imports: []string{"github.com/hashicorp/yamux"}},
	} {
		if len(complaints(map[string]pkg{p.ImportPath: p})) == 0 {
			t.Errorf("%s: no complaint", name)
		}
	}
}

// The agent goes into every guest; what it drags along, every guest carries.
func TestAgentStaysSmall(t *testing.T) {
	for path := range list(t, "-deps", "./cmd/banger-vsock-agent") {
		switch {
		case path == "net/http", path == "crypto/tls", strings.HasPrefix(path, "github.com/spf13/"):
			t.Errorf("banger-vsock-agent depends on %s", path)
		}
	}
}
