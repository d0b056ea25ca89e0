//go:build !unix

package process

func StartHint(error) string { return "" }

func LimitHint(error) string { return "" }
