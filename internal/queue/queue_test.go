package queue

import "testing"

func TestKeep(t *testing.T) {
	Keep() // nobody is there
	kept := 0
	OnKeep(func() { kept++ })
	Keep()
	if kept != 1 {
		t.Errorf("kept %d times, want once", kept)
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
