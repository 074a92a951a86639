"""Integer expressions as Python and as Triton: one by one, or as a program that computes nothing twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from codegen.integers import Dialect, Int, children


def names(roots: Iterable[Int]) -> frozenset[str]:
    """All variables and tables."""
    found: set[str] = set()
    seen: set[Int] = set()
    stack = list(roots)
    while stack:
        x = stack.pop()
        if x not in seen:
            seen.add(x)
            stack += children(x)
            if x.op in ("name", "load"):
                found.add(x.args[0])
    return frozenset(found)


def program(roots: Sequence[Int], dialect: Dialect = "python", prefix: str = "x") -> tuple[list[str], list[str]]:
    """Assignments of what is used more than once, in order, and the text of each root in their terms."""
    uses: dict[Int, int] = {}
    order: list[Int] = []

    def visit(x: Int) -> None:
        uses[x] = uses.get(x, 0) + 1
        if uses[x] == 1:
            for child in children(x):
                visit(child)
            order.append(x)

    for root in roots:
        visit(root)
    printer = Printer(dialect, {})
    lines: list[str] = []
    for x in order:
        if uses[x] > 1 and x.op not in ("number", "name"):
            text = printer.text(x)
            printer.called[x] = f"{prefix}{len(lines)}"
            lines.append(f"{printer.called[x]} = {text}")
    return lines, [printer.text(root) for root in roots]


class Printer:
    """Text of nodes, with names for those that have one."""

    def __init__(self, dialect: Dialect, called: dict[Int, str]) -> None:
        self.called = called
        self.triton = dialect == "triton"

    def text(self, x: Int) -> str:
        """The node, by its name where it has one."""
        if x in self.called:
            return self.called[x]
        return str(x.args[0]) if x.op in ("number", "name") else getattr(self, f"_{x.op}")(*x.args)

    def _inside(self, x: Int) -> str:
        """With brackets where the expression is not one word or call."""
        text = self.text(x)
        plain = (
            x in self.called or x.op in ("name", "load", "max", "min", "where") or (x.op == "number" and x.args[0] >= 0)
        )
        return text if plain else f"({text})"

    def _sum(self, constant: int, terms: tuple[tuple[Int, int], ...]) -> str:
        ordered = sorted(terms, key=lambda t: t[1] < 0)
        text = ""
        for node, w in ordered:
            inside = self.text(node) if abs(w) == 1 and w > 0 and node.op == "times" else self._inside(node)
            part = inside if abs(w) == 1 else f"{abs(w)} * {inside}"
            sign = ("" if w > 0 else "-") if not text else (" + " if w > 0 else " - ")
            text += sign + part
        return text + (f" {'+' if constant > 0 else '-'} {abs(constant)}" if constant else "")

    def _times(self, a: Int, b: Int) -> str:
        return f"{self._inside(a)} * {self._inside(b)}"

    def _nested(self, function: str, parts: tuple[Int, ...]) -> str:
        text = self.text(parts[0])
        for part in parts[1:]:
            text = f"{function}({text}, {self.text(part)})"
        return text

    def _max(self, *parts: Int) -> str:
        return self._nested("tl.maximum" if self.triton else "max", parts)

    def _min(self, *parts: Int) -> str:
        return self._nested("tl.minimum" if self.triton else "min", parts)

    def _floor(self, x: Int, by: Int) -> str:
        inside, c = self._inside(x), self._inside(by)
        if not self.triton or (x.least is not None and x.least >= 0):
            return f"{inside} // {c}"
        return f"({inside} - ({inside} % {c} + {c}) % {c}) // {c}"

    def _rest(self, x: Int, by: Int) -> str:
        inside, c = self._inside(x), self._inside(by)
        if not self.triton or (x.least is not None and x.least >= 0):
            return f"{inside} % {c}"
        return f"({inside} % {c} + {c}) % {c}"

    def _load(self, table: str, *index: Int) -> str:
        texts = [self.text(i) for i in index]
        return load_triton(table, texts) if self.triton else f"load({', '.join([table, *texts])})"

    def _le(self, a: Int, b: Int) -> str:
        return f"{self._inside(a)} <= {self._inside(b)}"

    def _lt(self, a: Int, b: Int) -> str:
        return f"{self._inside(a)} < {self._inside(b)}"

    def _and(self, *parts: Int) -> str:
        return " & ".join(f"({self.text(x)})" for x in parts)

    def _where(self, condition: Int, yes: Int, no: Int) -> str:
        function = "tl.where" if self.triton else "where"
        return f"{function}({self.text(condition)}, {self.text(yes)}, {self.text(no)})"


def load_triton(table: str, index: Sequence[str]) -> str:
    """The entry nearest to the index, of a contiguous table at pointer `table` with lengths `table`_n0, `table`_n1."""
    at = ""
    for axis, i in enumerate(index):
        size = f"{table}_n{axis}"
        clamped = f"tl.minimum(tl.maximum({i}, 0), {size} - 1)"
        at = clamped if not axis else f"({at}) * {size} + {clamped}"
    return f"tl.load({table} + {at})"
