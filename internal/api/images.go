package api

import "banger"

// More methods of images.
const (
	MethodImageRegister = "image.register"
	MethodImageSeed     = "image.seed"
	MethodImageTag      = "image.tag"
	MethodImagePrune    = "image.prune"
	MethodImageVerify   = "image.verify"
	MethodImageHistory  = "image.history"
	MethodImageExport   = "image.export"
)

// RegisterParams asks for a base image of a file system in a file of the
// client's.
type RegisterParams struct {
	Name  string `json:"name"`
	Label string `json:"label"` // how the user called the file
	File  int    `json:"file"`  // index of the file
	Seed  int    `json:"seed"`  // index of the work seed that came with it; -1: none
	Trim  bool   `json:"trim,omitempty"`
}

// SeedParams asks for another work seed of an image.
type SeedParams struct {
	Image  string `json:"image"`
	Source Source `json:"source"`
}

// TagParams gives an image one more name.
type TagParams struct {
	Image string `json:"image"`
	Name  string `json:"name"`
}

// Pruned is the result of MethodImagePrune.
type Pruned struct {
	Images     []string `json:"images"` // ids
	Blobs      int      `json:"blobs"`
	FreedBytes int64    `json:"freed_bytes"`
}

// Verified is the result of MethodImageVerify. The texts are untrusted.
type Verified struct {
	Image       banger.Image `json:"image"`
	Sound       bool         `json:"sound"` // nothing differs
	Entries     int          `json:"entries"`
	Differences []string     `json:"differences"`
	Notes       []string     `json:"notes"`
}

// History is the result of MethodImageHistory, newest first.
type History struct {
	Steps []HistoryStep `json:"steps"`
}

// A HistoryStep is how one layer came about. The texts are untrusted.
type HistoryStep struct {
	Created   string `json:"created,omitempty"` // as the image says
	CreatedBy string `json:"created_by,omitempty"`
	Comment   string `json:"comment,omitempty"`
	Digest    string `json:"digest,omitempty"` // of the layer; "" where the step made none
	SizeBytes int64  `json:"size_bytes"`       // of the layer, compressed
}

// ExportParams asks for an image in a file of the client's.
type ExportParams struct {
	Name   string `json:"name"`
	Output int    `json:"output"` // index of the file to write
}
