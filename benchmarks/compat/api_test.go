//go:build unix

package main

import (
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
)

const (
	theirPath = "github.com/cloudflare/tableflip"
	ourPath   = "example.com/tableflip"
)

// changed are the methods whose type is not tableflip's. Its stub takes any
// net.Listener and net.Conn. Ours takes what the Upgrader takes, so that one
// interface describes both.
var changed = map[string]bool{
	"testing.Fds.AddConn":          true,
	"testing.Fds.AddListener":      true,
	"testing.Upgrader.AddConn":     true,
	"testing.Upgrader.AddListener": true,
}

// TestAPI shows that whatever tableflip exports, ours exports with the same type.
// More is allowed, except in interfaces, which users may implement.
func TestAPI(t *testing.T) {
	for _, sub := range []string{"", "/testing"} {
		pkg := path.Base(ourPath + sub)
		t.Run(pkg, func(t *testing.T) {
			theirs := describe(load(t, ".", theirPath+sub))
			ours := describe(load(t, "../..", ourPath+sub))
			for _, name := range slices.Sorted(maps.Keys(theirs)) {
				if want, got := theirs[name], ours[name]; (got != want) != changed[pkg+"."+name] {
					t.Errorf("%s:\ntableflip: %s\nours:      %s", name, want, got)
				}
			}
			for _, name := range slices.Sorted(maps.Keys(ours)) {
				if theirs[name] == "" {
					t.Logf("only in ours: %s: %s", name, ours[name])
				}
			}
		})
	}
}

// TestProgramUsesEveryName keeps TestBehaviour's program complete.
func TestProgramUsesEveryName(t *testing.T) {
	theirs := load(t, ".", theirPath)
	files := token.NewFileSet()
	program, err := parser.ParseFile(files, "main.go", nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	ast.Inspect(program, func(node ast.Node) bool {
		switch node := node.(type) {
		case *ast.SelectorExpr:
			used[node.Sel.Name] = true
		case *ast.KeyValueExpr:
			if key, ok := node.Key.(*ast.Ident); ok {
				used[key.Name] = true
			}
		}
		return true
	})
	for name := range describe(theirs) {
		_, member, isMember := strings.Cut(name, ".")
		if !isMember {
			member = name
		}
		// Fds is embedded: its methods are used, and it is not named.
		if !used[member] && member != "Fds" {
			t.Errorf("main.go does not use %s", name)
		}
	}
}

// load returns a package as a module's go.mod provides it.
func load(t *testing.T, moduleDirectory, importPath string) *types.Package {
	t.Helper()
	exports := map[string]string{}
	list := goCommand(t, "list", "-C", moduleDirectory, "-deps", "-export", "-f", "{{.ImportPath}}\t{{.Export}}", importPath)
	for line := range strings.Lines(list) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), "\t")
		exports[path] = file
	}
	loader := importer.ForCompiler(token.NewFileSet(), "gc", func(path string) (io.ReadCloser, error) {
		return os.Open(exports[path])
	})
	pkg, err := loader.Import(importPath)
	if err != nil {
		t.Fatal(err)
	}
	return pkg
}

// describe maps what pkg exports, and the exported members of its types, to a
// description that is equal for what users can use in the same way.
func describe(pkg *types.Package) map[string]string {
	described := map[string]string{}
	for _, name := range pkg.Scope().Names() {
		object := pkg.Scope().Lookup(name)
		if !object.Exported() {
			continue
		}
		switch object := object.(type) {
		case *types.Const:
			described[name] = fmt.Sprintf("const %s = %s", describeType(object.Type()), object.Val())
		case *types.TypeName:
			described[name] = "type " + describeUnderlying(object.Type())
			maps.Copy(described, describeMembers(name, object.Type()))
		default: // a function or a variable
			described[name] = describeType(object.Type())
		}
	}
	return described
}

func describeUnderlying(t types.Type) string {
	if _, ok := t.Underlying().(*types.Struct); ok {
		return "struct"
	}
	return describeType(t.Underlying())
}

func describeMembers(name string, t types.Type) map[string]string {
	described := map[string]string{}
	if structure, ok := t.Underlying().(*types.Struct); ok {
		for field := range structure.Fields() {
			if field.Exported() {
				described[name+"."+field.Name()] = fmt.Sprintf("field %s, embedded: %t", describeType(field.Type()), field.Embedded())
			}
		}
	}
	if types.IsInterface(t) {
		return described // describeUnderlying says it all
	}
	for method := range types.NewMethodSet(types.NewPointer(t)).Methods() {
		if method.Obj().Exported() {
			described[name+"."+method.Obj().Name()] = describeType(method.Type())
		}
	}
	return described
}

// describeType writes a type without the names of parameters, and without the
// paths of packages, which is where the two differ.
func describeType(t types.Type) string {
	return types.TypeString(nameless(t), func(pkg *types.Package) string { return path.Base(pkg.Path()) })
}

func nameless(t types.Type) types.Type {
	switch t := t.(type) {
	case *types.Signature:
		return types.NewSignatureType(nil, nil, nil, namelessTuple(t.Params()), namelessTuple(t.Results()), t.Variadic())
	case *types.Interface:
		var methods []*types.Func
		for method := range t.Methods() { // also those of embedded interfaces
			methods = append(methods, types.NewFunc(token.NoPos, method.Pkg(), method.Name(), nameless(method.Type()).(*types.Signature)))
		}
		return types.NewInterfaceType(methods, nil)
	default:
		return t
	}
}

func namelessTuple(tuple *types.Tuple) *types.Tuple {
	var variables []*types.Var
	for variable := range tuple.Variables() {
		variables = append(variables, types.NewVar(token.NoPos, nil, "", nameless(variable.Type())))
	}
	return types.NewTuple(variables...)
}
