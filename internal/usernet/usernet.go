// Package usernet is the network of a VM in user space: what its guest may
// reach, and what may come from it.
package usernet
