//go:build !unix

package link

import (
	"errors"
	"os"
)

func pair() (a, b *os.File, err error) { return nil, nil, errors.ErrUnsupported }

func send(*os.File, []byte, []int, bool) (int, error) { return 0, errors.ErrUnsupported }

func receive(*os.File, []byte) (int, []*os.File, error) { return 0, nil, errors.ErrUnsupported }
