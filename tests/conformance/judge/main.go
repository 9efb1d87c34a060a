// Judge checks an exported log with the reference implementation of Go's checksum database: golang.org/x/mod's
// sumdb/note and sumdb/tlog. It shares no line of code, no language and no author with what it judges.
//
//	judge FOLDER LOGKEY [WITNESSKEY...]   whole log: note, cosignatures, every entry and tile, proofs
//	judge -same                           reads lines from standard input, answers OK or why not:
//	    record SIZE INDEX ROOT LEAFHASH [HASH...]     tlog.CheckRecord
//	    tree SIZE1 ROOT1 SIZE2 ROOT2 [HASH...]        tlog.CheckTree
//	    note VKEY BASE64                              note.Open
package main

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// cosigner verifies cosignature/v1 lines (key type 0x04), which x/mod does not know by itself.
type cosigner struct {
	name string
	hash uint32
	key  ed25519.PublicKey
}

func (c *cosigner) Name() string    { return c.name }
func (c *cosigner) KeyHash() uint32 { return c.hash }
func (c *cosigner) Verify(msg, sig []byte) bool {
	if len(sig) != 8+ed25519.SignatureSize {
		return false
	}
	at := binary.BigEndian.Uint64(sig)
	signed := append([]byte(fmt.Sprintf("cosignature/v1\ntime %d\n", at)), msg...)
	return ed25519.Verify(c.key, signed, sig[8:])
}

func newCosigner(vkey string) (note.Verifier, error) {
	parts := strings.SplitN(vkey, "+", 3)
	if len(parts) != 3 {
		return nil, fmt.Errorf("malformed witness key %q", vkey)
	}
	hash, err := strconv.ParseUint(parts[1], 16, 32)
	if err != nil {
		return nil, err
	}
	key, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || len(key) != 1+ed25519.PublicKeySize || key[0] != 4 {
		return nil, fmt.Errorf("witness key %q is not of type 0x04", vkey)
	}
	return &cosigner{parts[0], uint32(hash), ed25519.PublicKey(key[1:])}, nil
}

// folder reads tiles of an exported tree; the paths of tlog-tiles are those of x/mod without the height.
type folder struct {
	path string
	read int
}

func (f *folder) Height() int { return 8 }
func (f *folder) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var all [][]byte
	for _, tile := range tiles {
		data, err := os.ReadFile(filepath.Join(f.path, strings.Replace(tile.Path(), "tile/8/", "tile/", 1)))
		if err != nil {
			return nil, err
		}
		all = append(all, data)
		f.read++
	}
	return all, nil
}
func (f *folder) SaveTiles(tiles []tlog.Tile, data [][]byte) {}

func checkpoint(f *folder, keys []string) (tlog.Tree, int, error) {
	var tree tlog.Tree
	log, err := note.NewVerifier(keys[0])
	if err != nil {
		return tree, 0, err
	}
	known := []note.Verifier{log}
	for _, key := range keys[1:] {
		witness, err := newCosigner(key)
		if err != nil {
			return tree, 0, err
		}
		known = append(known, witness)
	}
	data, err := os.ReadFile(filepath.Join(f.path, "checkpoint"))
	if err != nil {
		return tree, 0, err
	}
	opened, err := note.Open(data, note.VerifierList(known...))
	if err != nil {
		return tree, 0, err
	}
	if len(opened.Sigs) != len(keys) {
		return tree, 0, fmt.Errorf("%d signatures verify, %d keys were given", len(opened.Sigs), len(keys))
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) != 4 || lines[3] != "" || lines[0] != log.Name() {
		return tree, 0, fmt.Errorf("checkpoint text %q", opened.Text)
	}
	if tree.N, err = strconv.ParseInt(lines[1], 10, 64); err != nil {
		return tree, 0, err
	}
	tree.Hash, err = tlog.ParseHash(lines[2])
	return tree, len(opened.Sigs), err
}

func bundlePath(index int64, width int) string {
	path := strings.Replace(tlog.Tile{H: 8, L: 0, N: index, W: width}.Path(), "tile/8/0/", "tile/entries/", 1)
	return path
}

func whole(path string, keys []string) error {
	f := &folder{path: path}
	tree, signatures, err := checkpoint(f, keys)
	if err != nil {
		return err
	}
	if tree.N == 0 {
		if root, _ := hex.DecodeString("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"); !bytes.Equal(root, tree.Hash[:]) {
			return fmt.Errorf("the empty tree has root %v", tree.Hash)
		}
		fmt.Printf("OK size=0 signatures=%d entries=0 inclusion=0 consistency=0 tiles=0\n", signatures)
		return nil
	}
	reader := tlog.TileHashReader(tree, f) // checks every tile that it reads against the root
	root, err := tlog.TreeHash(tree.N, reader)
	if err != nil || root != tree.Hash {
		return fmt.Errorf("tree hash: %v %v", root, err)
	}
	entries := int64(0)
	for index := int64(0); index*256 < tree.N; index++ {
		width := int64(256)
		if rest := tree.N - index*256; rest < width {
			width = rest
		}
		data, err := os.ReadFile(filepath.Join(path, bundlePath(index, int(width))))
		if err != nil {
			return err
		}
		var places []int64
		var hashes []tlog.Hash
		for i := int64(0); i < width; i++ {
			if len(data) < 2 || len(data) < 2+int(binary.BigEndian.Uint16(data)) {
				return fmt.Errorf("bundle %d is cut short", index)
			}
			length := int(binary.BigEndian.Uint16(data))
			hashes = append(hashes, tlog.RecordHash(data[2:2+length]))
			places = append(places, tlog.StoredHashIndex(0, index*256+i))
			data = data[2+length:]
			entries++
		}
		if len(data) != 0 {
			return fmt.Errorf("bundle %d goes on after its entries", index)
		}
		known, err := reader.ReadHashes(places)
		if err != nil {
			return err
		}
		for i := range hashes {
			if hashes[i] != known[i] {
				return fmt.Errorf("entry %d is not the leaf that was hashed", index*256+int64(i))
			}
		}
	}
	inclusion, consistency := 0, 0
	step := tree.N/64 + 1
	for n := int64(0); n < tree.N; n += step {
		proof, err := tlog.ProveRecord(tree.N, n, reader)
		if err != nil {
			return err
		}
		leaf, err := reader.ReadHashes([]int64{tlog.StoredHashIndex(0, n)})
		if err != nil {
			return err
		}
		if err := tlog.CheckRecord(proof, tree.N, tree.Hash, n, leaf[0]); err != nil {
			return err
		}
		inclusion++
		old, err := tlog.TreeHash(n+1, reader)
		if err != nil {
			return err
		}
		grown, err := tlog.ProveTree(tree.N, n+1, reader)
		if err != nil {
			return err
		}
		if err := tlog.CheckTree(grown, tree.N, tree.Hash, n+1, old); err != nil {
			return err
		}
		consistency++
	}
	fmt.Printf("OK size=%d signatures=%d entries=%d inclusion=%d consistency=%d tiles=%d\n",
		tree.N, signatures, entries, inclusion, consistency, f.read)
	return nil
}

func hashes(words []string) ([]tlog.Hash, error) {
	var all []tlog.Hash
	for _, word := range words {
		hash, err := tlog.ParseHash(word)
		if err != nil {
			return nil, err
		}
		all = append(all, hash)
	}
	return all, nil
}

func answer(words []string) error {
	if words[0] == "note" && len(words) == 3 {
		verifier, err := note.NewVerifier(words[1])
		if err != nil {
			return err
		}
		data, err := base64.StdEncoding.DecodeString(words[2])
		if err != nil {
			return err
		}
		_, err = note.Open(data, note.VerifierList(verifier))
		return err
	}
	if len(words) < 5 || (words[0] != "record" && words[0] != "tree") {
		return fmt.Errorf("unknown question")
	}
	first, err := strconv.ParseInt(words[1], 10, 64)
	if err != nil {
		return err
	}
	proof, err := hashes(words[5:])
	if err != nil {
		return err
	}
	if words[0] == "record" {
		index, err := strconv.ParseInt(words[2], 10, 64)
		if err != nil {
			return err
		}
		pair, err := hashes(words[3:5])
		if err != nil {
			return err
		}
		return tlog.CheckRecord(proof, first, pair[0], index, pair[1])
	}
	second, err := strconv.ParseInt(words[3], 10, 64)
	if err != nil {
		return err
	}
	pair, err := hashes([]string{words[2], words[4]})
	if err != nil {
		return err
	}
	return tlog.CheckTree(proof, second, pair[1], first, pair[0])
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == "-same" {
		lines := bufio.NewScanner(os.Stdin)
		lines.Buffer(make([]byte, 1<<20), 1<<20)
		for lines.Scan() {
			if err := answer(strings.Fields(lines.Text())); err != nil {
				fmt.Println("NO", strings.ReplaceAll(err.Error(), "\n", " "))
			} else {
				fmt.Println("OK")
			}
		}
		return
	}
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: judge FOLDER LOGKEY [WITNESSKEY...] | judge -same")
		os.Exit(2)
	}
	if err := whole(os.Args[1], os.Args[2:]); err != nil {
		fmt.Println("REFUSED", err)
		os.Exit(1)
	}
}
