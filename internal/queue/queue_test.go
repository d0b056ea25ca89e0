package queue

import (
	"context"
	"testing"
)

func TestKeep(t *testing.T) {
	Keep() // nobody is there
	kept := 0
	OnKeep(func() { kept++ })
	Keep()
	if kept != 1 {
		t.Errorf("kept %d times, want once", kept)
	}
}

func TestKeeping(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if IsKept(ctx) {
		t.Error("it is kept already")
	}
	ctx, cancel = context.WithCancel(Keeping(ctx))
	defer cancel()
	if !IsKept(ctx) {
		t.Error("it is not kept")
	}
}

func TestAsk(t *testing.T) {
	if Ask() {
		t.Error("somebody was there")
	}
	select {
	case <-Asked():
		t.Error("asked before anybody was there")
	default:
	}
	for range 2 {
		if !Ask() {
			t.Error("nobody was there")
		}
	}
	<-Asked()
	select {
	case <-Asked():
		t.Error("asked twice")
	default:
	}
}
