package tableflip

import (
	"os"
	"reflect"
	"testing"

	"example.com/tableflip/internal/nametable"
)

func TestVariablesTakenOnce(t *testing.T) {
	t.Cleanup(forgetVariables)
	foreign := []string{nametable.Variable + "S", "X" + nametable.Variable, "TABLEFLIP_OTHER"}
	for _, variable := range append(foreign, nametable.Variable, nametable.Variable+"_0", nametable.Variable+"_17") {
		t.Setenv(variable, "value of "+variable)
	}
	first, err := takeVariables()
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != 3 || first[nametable.Variable+"_17"] != "value of "+nametable.Variable+"_17" {
		t.Errorf("took %v", first)
	}
	for variable := range first {
		if _, ok := os.LookupEnv(variable); ok {
			t.Errorf("%s is still there", variable)
		}
	}
	for _, variable := range foreign {
		if _, ok := os.LookupEnv(variable); !ok {
			t.Errorf("%s, which belongs to someone else, is gone", variable)
		}
	}

	if second, err := takeVariables(); err != nil || !reflect.DeepEqual(second, first) {
		t.Errorf("before they were used, they are %v, %v the second time", second, err)
	}
	forgetVariables()
	if third, err := takeVariables(); err != nil || third != nil {
		t.Errorf("after they were used, there are still %v, %v", third, err)
	}
}
