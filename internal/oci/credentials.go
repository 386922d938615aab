package oci

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// credentials for one registry; the zero value is anonymous.
type credentials struct {
	Username      string
	Password      string
	IdentityToken string // a refresh token for the token server
	RegistryToken string // a bearer token as it is
}

const (
	maxAuthFileBytes = 4 << 20
	maxHelperBytes   = 1 << 20
	helperTimeout    = 30 * time.Second

	dockerHubAuthKey = "https://index.docker.io/v1/"
)

// authFile is Docker's config.json; Podman's auth.json is the same.
type authFile struct {
	Auths map[string]struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
		RegistryToken string `json:"registrytoken"`
	} `json:"auths"`
	CredsStore  string            `json:"credsStore"`
	CredHelpers map[string]string `json:"credHelpers"`
}

// lookupCredentials finds the login for a registry where docker login and
// podman login leave it: $DOCKER_CONFIG or ~/.docker, $REGISTRY_AUTH_FILE,
// containers/auth.json in the runtime and config folders. The first file there
// is counts. No file, or nothing in it, is anonymous.
func lookupCredentials(ctx context.Context, host string) (credentials, error) {
	for _, path := range authFilePaths() {
		f, err := readAuthFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return credentials{}, err
		}
		return f.lookup(ctx, host)
	}
	return credentials{}, nil
}

func authFilePaths() []string {
	var paths []string
	home, _ := os.UserHomeDir()
	add := func(dir string, rest ...string) {
		if filepath.IsAbs(dir) {
			paths = append(paths, filepath.Join(append([]string{dir}, rest...)...))
		}
	}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		add(dir, "config.json")
	} else {
		add(home, ".docker", "config.json")
	}
	add(os.Getenv("REGISTRY_AUTH_FILE"))
	add(os.Getenv("XDG_RUNTIME_DIR"), "containers", "auth.json")
	if dir := os.Getenv("XDG_CONFIG_HOME"); dir != "" {
		add(dir, "containers", "auth.json")
	} else {
		add(home, ".config", "containers", "auth.json")
	}
	return paths
}

func readAuthFile(path string) (*authFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxAuthFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxAuthFileBytes {
		return nil, fmt.Errorf("%s: more than %d bytes", path, maxAuthFileBytes)
	}
	var a authFile
	if err := json.Unmarshal(raw, &a); err != nil {
		return nil, fmt.Errorf("%s: not valid JSON", path)
	}
	return &a, nil
}

// keys are the spellings under which a registry may be found.
func authKeys(host string) []string {
	if host == dockerHub {
		return []string{dockerHubAuthKey, "docker.io", "index.docker.io", "registry-1.docker.io"}
	}
	return []string{host, "https://" + host, "http://" + host}
}

func (a *authFile) lookup(ctx context.Context, host string) (credentials, error) {
	for _, key := range authKeys(host) {
		if helper := a.CredHelpers[key]; helper != "" {
			return runHelper(ctx, helper, key)
		}
	}
	if a.CredsStore != "" {
		c, err := runHelper(ctx, a.CredsStore, authKeys(host)[0])
		if err != nil || c != (credentials{}) {
			return c, err
		}
	}
	for _, key := range authKeys(host) {
		for k, v := range a.Auths {
			if strings.TrimSuffix(k, "/") != strings.TrimSuffix(key, "/") {
				continue
			}
			c := credentials{Username: v.Username, Password: v.Password, IdentityToken: v.IdentityToken, RegistryToken: v.RegistryToken}
			if v.Auth != "" {
				raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(v.Auth))
				user, pass, ok := strings.Cut(strings.TrimRight(string(raw), "\x00"), ":")
				if err != nil || !ok {
					return credentials{}, fmt.Errorf("login of %q is damaged", k)
				}
				c.Username, c.Password = user, pass
			}
			return c, nil
		}
	}
	return credentials{}, nil
}

var helperPattern = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)

// runHelper asks a credential helper; docker-credential-helpers' protocol.
func runHelper(ctx context.Context, name, server string) (credentials, error) {
	if !helperPattern.MatchString(name) {
		return credentials{}, fmt.Errorf("credential helper %q: not a name", clip(name))
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker-credential-"+name, "get")
	cmd.Stdin = strings.NewReader(server)
	out := &tailBuffer{most: maxHelperBytes}
	cmd.Stdout = out
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	text := bytes.TrimSpace(out.buf)
	if err != nil {
		if strings.Contains(string(text), "credentials not found") {
			return credentials{}, nil
		}
		return credentials{}, fmt.Errorf("credential helper docker-credential-%s: %w", name, err)
	}
	var answer struct{ Username, Secret string }
	if out.cut || json.Unmarshal(text, &answer) != nil {
		return credentials{}, fmt.Errorf("credential helper docker-credential-%s: answer not understood", name)
	}
	if answer.Username == "<token>" {
		return credentials{IdentityToken: answer.Secret}, nil
	}
	return credentials{Username: answer.Username, Password: answer.Secret}, nil
}

// tailBuffer keeps the last bytes written to it.
type tailBuffer struct {
	buf  []byte
	most int
	cut  bool
}

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - t.most; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
		t.cut = true
	}
	return len(p), nil
}
