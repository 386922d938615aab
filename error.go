package banger

import (
	"errors"
	"fmt"
)

// A Code says what kind of error this is, for machines. The exit code that
// belongs to it is decided in internal/cli.
type Code string

const (
	CodeUsage       Code = "usage"       // arguments that do not parse
	CodeNotFound    Code = "not-found"   // the named thing does not exist
	CodeConflict    Code = "conflict"    // it exists already, or is in use
	CodeInvalid     Code = "invalid"     // bytes from outside are not what they must be
	CodeUnavailable Code = "unavailable" // something needed is missing or does not answer
	CodeNoSpace     Code = "no-space"    // a disk is full
	CodeTimeout     Code = "timeout"     // a time limit passed
	CodeCanceled    Code = "canceled"    // the user asked to stop
	CodeGuest       Code = "guest"       // the guest failed: boot, panic, exec
	CodeInternal    Code = "internal"    // a defect of banger itself

	CodeCommandNotFound      Code = "command-not-found"      // in the guest
	CodeCommandNotExecutable Code = "command-not-executable" // in the guest
)

// An Error is one line for the user: subject and reason in Message, the next
// step in Hint. Rooms of banger return it where they know the next step; plain
// errors become CodeInternal at the edge.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`          // "subject: reason", lower case, no full stop
	Hint    string `json:"hint,omitempty"`   // what to do next
	Detail  string `json:"detail,omitempty"` // more lines, e.g. the end of a console; untrusted text
	Err     error  `json:"-"`                // the cause, for errors.Is
}

func (e *Error) Error() string { return e.Message }
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error. The cause is the operand of a %w verb, if any.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: errors.Unwrap(err)}
}

// WithHint sets the next step and returns e.
func (e *Error) WithHint(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

// CodeOf returns the code of the *Error in err's chain, CodeInternal where
// there is none, and "" for nil.
func CodeOf(err error) Code {
	var e *Error
	switch {
	case err == nil:
		return ""
	case errors.As(err, &e):
		return e.Code
	}
	return CodeInternal
}
