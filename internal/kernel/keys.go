package kernel

import (
	"bytes"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// archiveKeysArmored holds the six public keys named in archiveKeys, exported
// (export-minimal) from Debian's debian-archive-keyring 2023.3+deb12u2.
//
//go:embed debian-archive.asc
var archiveKeysArmored []byte

// archiveKeys names every key that is trusted to sign a Debian suite, by the
// fingerprint of its primary key. The embedded bytes must hold exactly these.
var archiveKeys = map[string]string{
	"b8b80b5b623eab6ad8775c45b7c5d7d6350947f8": "Debian Archive Automatic Signing Key (12/bookworm)",
	"05ab90340c0c5e797f44a8c8254cf3b5aec0a8f0": "Debian Security Archive Automatic Signing Key (12/bookworm)",
	"4d64fec119c2029067d6e791f8d2585b8783d481": "Debian Stable Release Key (12/bookworm)",
	"04b54c3cdca79751b16bc6b5225629df75b188bd": "Debian Archive Automatic Signing Key (13/trixie)",
	"5e04a1e3223a19a20706e20f9904613d4cce68c6": "Debian Security Archive Automatic Signing Key (13/trixie)",
	"41587f7db8c774bccf131416762f67a0b2c39de4": "Debian Stable Release Key (13/trixie)",
}

// loadArchiveKeys parses the embedded keys once. An embedded key that is not
// in the table, or the reverse, is a defect of the build and trusts nothing.
var loadArchiveKeys = sync.OnceValues(func() (openpgp.EntityList, error) {
	return readKeyring(archiveKeysArmored, archiveKeys)
})

func readKeyring(armored []byte, want map[string]string) (openpgp.EntityList, error) {
	keys, err := openpgp.ReadArmoredKeyRing(bytes.NewReader(armored))
	if err != nil {
		return nil, fmt.Errorf("embedded archive keys: %w", err)
	}
	seen := make(map[string]bool)
	for _, k := range keys {
		fpr := hex.EncodeToString(k.PrimaryKey.Fingerprint)
		if _, ok := want[fpr]; !ok {
			return nil, fmt.Errorf("embedded archive keys: %s is not in the table", fpr)
		}
		seen[fpr] = true
	}
	for fpr, name := range want {
		if !seen[fpr] {
			return nil, fmt.Errorf("embedded archive keys: %s (%s) is missing", fpr, name)
		}
	}
	return keys, nil
}

// What can be wrong with a clear-signed file. Each refusal wraps one of these.
var (
	errNotSigned     = errors.New("not clear-signed")
	errOutsideText   = errors.New("text outside the signed part")
	errTruncated     = errors.New("truncated")
	errUnknownSigner = errors.New("not signed by a known archive key")
	errBadSignature  = errors.New("bad signature")
	errExpiredKey    = errors.New("signed by an expired key")
	errRevokedKey    = errors.New("signed by a revoked key")
)

const (
	maxSignatures = 32       // in one clear-signed file
	maxArmorBytes = 64 << 10 // of its signature block, decoded

	beginSigned    = "-----BEGIN PGP SIGNED MESSAGE-----"
	beginSignature = "-----BEGIN PGP SIGNATURE-----"
	endSignature   = "-----END PGP SIGNATURE-----"
)

// verifyClearSigned checks a clear-signed file (RFC 9580, section 7) and
// returns the text that the signature covers, with "\n" line ends; nothing
// else of the file is to be believed. The file must be that one message and no
// more. One good signature by a key of the ring suffices: archives sign with
// several keys while they change from one to the next.
func verifyClearSigned(data []byte, keys openpgp.KeyRing, now time.Time) ([]byte, error) {
	data = bytes.TrimRight(data, " \t\r\n")
	if !bytes.Contains(data, []byte(beginSigned)) {
		return nil, errNotSigned
	}
	if line, _, _ := bytes.Cut(data, []byte("\n")); string(bytes.TrimRight(line, "\r")) != beginSigned {
		return nil, errOutsideText
	}
	if !bytes.Contains(data, []byte("\n"+endSignature)) {
		return nil, errTruncated
	}
	if !bytes.HasSuffix(data, []byte("\n"+endSignature)) {
		return nil, errOutsideText
	}
	// Two messages in a row would leave the second unread; refuse both.
	if bytes.Count(data, []byte("\n"+beginSignature)) != 1 || bytes.Count(data, []byte(beginSigned)) != 1 {
		return nil, errOutsideText
	}
	block, rest := clearsign.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%w: malformed framing", errNotSigned)
	}
	if len(bytes.TrimSpace(rest)) != 0 {
		return nil, errOutsideText
	}
	raw, err := io.ReadAll(io.LimitReader(block.ArmoredSignature.Body, maxArmorBytes+1))
	if err != nil {
		return nil, fmt.Errorf("%w: signature block: %v", errBadSignature, err)
	}
	if len(raw) > maxArmorBytes {
		return nil, fmt.Errorf("%w: signature block over %d bytes", errBadSignature, maxArmorBytes)
	}
	if err := anyGoodSignature(block.Bytes, raw, keys, now); err != nil {
		return nil, err
	}
	return bytes.ReplaceAll(block.Bytes, []byte("\r\n"), []byte("\n")), nil
}

// anyGoodSignature tries each signature packet by itself and returns the most
// telling error if none is good.
func anyGoodSignature(text, raw []byte, keys openpgp.KeyRing, now time.Time) error {
	config := &packet.Config{Time: func() time.Time { return now }}
	worst := error(errUnknownSigner)
	packets := packet.NewReader(bytes.NewReader(raw))
	for range maxSignatures {
		p, err := packets.Next()
		if err != nil {
			if err != io.EOF && errors.Is(worst, errUnknownSigner) {
				worst = fmt.Errorf("%w: %v", errBadSignature, err)
			}
			return worst
		}
		sig, ok := p.(*packet.Signature)
		if !ok {
			return fmt.Errorf("%w: a packet that is no signature", errBadSignature)
		}
		// Only a signature over text or bytes is one of this document; others
		// certify keys.
		if sig.SigType != packet.SigTypeText && sig.SigType != packet.SigTypeBinary {
			continue
		}
		var one bytes.Buffer
		if err := sig.Serialize(&one); err != nil {
			continue
		}
		_, err = openpgp.CheckDetachedSignature(keys, bytes.NewReader(text), &one, config)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, pgperrors.ErrUnknownIssuer):
		case errors.Is(err, pgperrors.ErrKeyExpired), errors.Is(err, pgperrors.ErrSignatureExpired):
			worst = errExpiredKey
		case errors.Is(err, pgperrors.ErrKeyRevoked):
			worst = errRevokedKey
		default:
			worst = fmt.Errorf("%w: %s", errBadSignature, strings.TrimPrefix(err.Error(), "openpgp: "))
		}
	}
	return fmt.Errorf("%w: more than %d signatures", errBadSignature, maxSignatures)
}
