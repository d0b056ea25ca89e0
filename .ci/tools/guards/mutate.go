package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"slices"
	"strings"
)

// A mutant is a package with one guard taken out.
type mutant struct{ file, function, guard string }

func (m mutant) String() string { return m.file + "\t" + m.function + "\t" + m.guard }

var (
	isErrCheck = regexp.MustCompile(`^\w*[eE]rr\w* != nil$`)
	// What only tells somebody, what cannot be taken out alone, and what tests need.
	isKept = regexp.MustCompile(`(?i)^(\w+\.)*(lock|unlock|rlock|runlock|panic|warn|log|info|error|debug|reached)\(`)
	bounds = map[token.Token]string{token.LSS: " || %s && mutant(%d)", token.GTR: " || %s && mutant(%d)", token.LEQ: " && !(%s && mutant(%d))", token.GEQ: " && !(%s && mutant(%d))"}
)

// mutator writes all mutants of a package into its source: each asks mutant(N) whether
// it is the one that this process is to be.
type mutator struct {
	mutants  []mutant
	fset     *token.FileSet
	source   []byte
	in       mutant // the file and the function
	end      ast.Stmt
	nested   map[ast.Expr]bool
	inserted []insertion
}

type insertion struct {
	at, order int // at the same place, what was begun first is ended last
	text      string
}

func (m *mutator) offset(p token.Pos) int { return m.fset.Position(p).Offset }

func (m *mutator) text(n ast.Node) string {
	return strings.Join(strings.Fields(string(m.source[m.offset(n.Pos()):m.offset(n.End())])), " ")
}

func (m *mutator) insert(at int, ends bool, format string, args ...any) {
	order := len(m.inserted) + 1
	if ends {
		order = -order
	}
	m.inserted = append(m.inserted, insertion{at, order, fmt.Sprintf(format, args...)})
}

// add returns the number of a new mutant.
func (m *mutator) add(kind, text string) int {
	guard := []rune(kind + " " + text)
	m.in.guard = string(guard[:min(len(guard), 100)])
	same := 1
	for name := m.in.guard; slices.Contains(m.mutants, m.in); m.in.guard = fmt.Sprint(name, " #", same) {
		same++
	}
	m.mutants = append(m.mutants, m.in)
	return len(m.mutants)
}

func (m *mutator) wrap(n ast.Node, before string, number int, after string) {
	m.insert(m.offset(n.Pos()), false, before, number)
	m.insert(m.offset(n.End()), true, "%s", after)
}

func (m *mutator) never(e ast.Expr)  { m.wrap(e, "mutantNever(%d, ", m.add("never", m.text(e)), ")") }
func (m *mutator) always(e ast.Expr) { m.wrap(e, "mutantAlways(%d, ", m.add("always", m.text(e)), ")") }

func (m *mutator) condition(e ast.Expr) {
	if e == nil {
		return
	}
	m.never(e)
	if b, ok := e.(*ast.BinaryExpr); !(ok && b.Op == token.LAND) && !isErrCheck.MatchString(m.text(e)) {
		m.always(e)
	}
}

// operands takes out those of a && b && c, or of a || b || c.
func (m *mutator) operands(e ast.Expr, op token.Token) {
	if b, ok := e.(*ast.BinaryExpr); ok && b.Op == op {
		m.nested[e] = true
		m.operands(b.X, op)
		m.operands(b.Y, op)
	} else if op == token.LAND {
		m.always(e)
	} else {
		m.never(e)
	}
}

func (m *mutator) statement(s ast.Stmt) {
	switch s := s.(type) {
	case *ast.AssignStmt:
		if s.Tok == token.DEFINE {
			return
		}
	case *ast.ExprStmt, *ast.DeferStmt, *ast.GoStmt, *ast.SendStmt, *ast.IncDecStmt:
	default:
		return
	}
	if text := strings.TrimPrefix(m.text(s), "defer "); !isKept.MatchString(text) {
		m.wrap(s, "if !mutant(%d) { ", m.add("drop", m.text(s)), " }")
	}
}

func (m *mutator) clauses(of ast.Stmt, body *ast.BlockStmt, conditions bool) {
	for _, s := range body.List {
		switch c := s.(type) {
		case *ast.CaseClause:
			for _, e := range c.List {
				if conditions {
					m.condition(e)
				} else {
					m.clause(of, e, c.Body)
					break
				}
			}
		case *ast.CommClause:
			if c.Comm != nil {
				m.clause(of, c.Comm, c.Body)
			}
		}
	}
}

// clause leaves a switch, or a select, at the beginning of one of its cases.
func (m *mutator) clause(of ast.Stmt, what ast.Node, body []ast.Stmt) {
	if of != m.end && len(body) > 0 {
		m.insert(m.offset(body[0].Pos()), false, "if mutant(%d) { break }; ", m.add("drop", "case "+m.text(what)))
	}
}

func (m *mutator) visit(n ast.Node) bool {
	var body []ast.Stmt
	switch n := n.(type) {
	case *ast.IfStmt:
		m.condition(n.Cond)
	case *ast.ForStmt:
		if n.Cond != nil {
			m.never(n.Cond)
		}
	case *ast.BinaryExpr:
		if (n.Op == token.LAND || n.Op == token.LOR) && !m.nested[n] {
			m.operands(n, n.Op)
		}
		y := m.text(n.Y)
		if format := bounds[n.Op]; format != "" && y != "0" {
			m.insert(m.offset(n.Pos()), false, "(")
			m.insert(m.offset(n.End()), true, format+")", m.text(n.X)+" == "+y, m.add("bound", m.text(n)))
		}
	case *ast.CallExpr:
		for _, arg := range n.Args {
			if _, ok := arg.(*ast.CallExpr); ok && m.text(n.Fun) == "errors.Join" {
				m.wrap(arg, "mutantUnless(mutant(%d), func() error { return ", m.add("drop", m.text(arg)), " })")
			}
		}
	case *ast.SwitchStmt:
		m.clauses(n, n.Body, n.Tag == nil)
	case *ast.TypeSwitchStmt:
		m.clauses(n, n.Body, false)
	case *ast.SelectStmt:
		m.clauses(n, n.Body, false)
	case *ast.BlockStmt:
		body = n.List
	case *ast.CaseClause:
		body = n.Body
	case *ast.CommClause:
		body = n.Body
	}
	for _, s := range body {
		m.statement(s)
	}
	return true
}

// mutate returns the source of a file with all its mutants.
func (m *mutator) mutate(name string, source []byte) (string, error) {
	m.fset, m.source, m.inserted, m.nested = token.NewFileSet(), source, nil, map[ast.Expr]bool{}
	file, err := parser.ParseFile(m.fset, name, source, parser.SkipObjectResolution)
	if err != nil {
		return "", err
	}
	for _, d := range file.Decls {
		f, ok := d.(*ast.FuncDecl)
		if !ok || f.Body == nil || len(f.Body.List) == 0 {
			continue
		}
		m.in = mutant{file: name, function: f.Name.Name}
		if f.Recv != nil {
			m.in.function = strings.Trim(m.text(f.Recv.List[0].Type), "*") + "." + f.Name.Name
		}
		m.end = nil
		if f.Type.Results != nil {
			m.end = f.Body.List[len(f.Body.List)-1] // without a return after it
		}
		ast.Inspect(f.Body, m.visit)
	}

	slices.SortFunc(m.inserted, func(a, b insertion) int { return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.order, b.order)) })
	var out strings.Builder
	from := 0
	for _, i := range m.inserted {
		out.Write(source[from:i.at])
		out.WriteString(i.text)
		from = i.at
	}
	out.Write(source[from:])
	return out.String(), nil
}
