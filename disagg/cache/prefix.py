"""Which prefixes have blocks in the pools: a tree of blocks, each with the slot it has in every layer group, or none.

A node is one block of tokens after the node before it. It lives while it has a slot, a child or a sequence that stands
on it, so the whole chain of every slot is known: what lies in a slot is decided by comparing tokens, never by a hash
alone, and what extends a bad block is found by walking down from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from disagg.cache.identity import BlockHasher, root_bytes

NO_SLOT = -1


class PrefixNode:
    """One block of a prefix. `slots[g]`: where group g has it, or -1. Changed only by its `PrefixTree`."""

    __slots__ = ("children", "identity", "is_dead", "num_pins", "parent", "slots", "tokens")

    def __init__(self, identity: bytes, parent: PrefixNode | None, tokens: bytes, num_groups: int) -> None:
        self.identity, self.parent, self.tokens = identity, parent, tokens
        self.slots = [NO_SLOT] * num_groups
        self.children: set[PrefixNode] = set()
        self.num_pins = 0
        self.is_dead = False
        """Taken out of the tree while a sequence stood on it: nothing may be registered behind it."""

    @property
    def is_needed(self) -> bool:
        return bool(self.children) or self.num_pins > 0 or max(self.slots, default=NO_SLOT) != NO_SLOT


class PrefixTree:
    """Nodes by name. Knows no pools: `KVCache` keeps slots and nodes in step."""

    def __init__(self, hasher: BlockHasher, num_groups: int) -> None:
        self._hasher, self._num_groups = hasher, num_groups
        self._nodes: dict[bytes, PrefixNode] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[PrefixNode]:
        return iter(self._nodes.values())

    def match(self, salt: str, blocks: Iterable[bytes], precision: str = "") -> list[PrefixNode]:
        """The nodes of the longest known prefix of these blocks (`token_bytes` of each)."""
        path: list[PrefixNode] = []
        node = self._find(self._hasher.root(salt, precision), None, root_bytes(salt, precision))
        if node is None:
            return path
        for block in blocks:
            node = self._only_child(node, block) or self._find(self._hasher.child(node.identity, block), node, block)
            if node is None:
                return path
            path.append(node)
        return path

    def root(self, salt: str, precision: str = "") -> PrefixNode | None:
        """The node before the first block, made if need be; None when its name is taken."""
        return self._find_or_add(self._hasher.root(salt, precision), None, root_bytes(salt, precision))

    def extend(self, node: PrefixNode, blocks: Iterable[bytes]) -> list[PrefixNode]:
        """The nodes of these blocks after `node`, made if need be; fewer where the name of one is taken."""
        path: list[PrefixNode] = []
        for block in blocks:
            child = self._only_child(node, block)
            if child is None:
                child = self._find_or_add(self._hasher.child(node.identity, block), node, block)
                if child is None:
                    return path
            path.append(child)
            node = child
        return path

    def pin(self, node: PrefixNode) -> None:
        node.num_pins += 1

    def unpin(self, node: PrefixNode) -> None:
        node.num_pins -= 1
        self.prune(node)

    def prune(self, node: PrefixNode | None) -> None:
        """Drop a node that nothing needs any more, and those before it that lived for it."""
        while node is not None and not node.is_dead and not node.is_needed:
            del self._nodes[node.identity]
            node.is_dead = True
            if node.parent is not None:
                node.parent.children.discard(node)
            node = node.parent

    def cut(self, top: PrefixNode) -> list[PrefixNode]:
        """Take `top` and all that extends it out of the tree: the nodes, which still name their slots."""
        if top.is_dead:
            return []
        taken, stack = [], [top]
        while stack:
            node = stack.pop()
            stack.extend(node.children)
            del self._nodes[node.identity]
            node.is_dead = True
            taken.append(node)
        if top.parent is not None:
            top.parent.children.discard(top)
            self.prune(top.parent)
        return taken

    def check_invariants(self) -> None:
        """Every node is found by its name, is needed, and is known to the living node before it."""
        for identity, node in self._nodes.items():
            assert node.identity == identity
            assert not node.is_dead, "a dead node is in the tree"
            assert node.is_needed, "a node lives for nothing"
            assert node.num_pins >= 0
            assert all(child.parent is node and not child.is_dead for child in node.children)
            if node.parent is not None:
                assert self._nodes.get(node.parent.identity) is node.parent, "a node outlived the one before it"
                assert node in node.parent.children

    def _only_child(self, node: PrefixNode, block: bytes) -> PrefixNode | None:
        """The node of this block, if it is all that follows `node`: the tokens decide, so no name need be computed."""
        if len(node.children) != 1:
            return None
        (child,) = node.children
        return child if child.tokens == block else None

    def _find(self, identity: bytes, parent: PrefixNode | None, tokens: bytes) -> PrefixNode | None:
        """The node of this name if it is truly this block: equal names alone prove nothing."""
        node = self._nodes.get(identity)
        return node if node is not None and node.parent is parent and node.tokens == tokens else None

    def _find_or_add(self, identity: bytes, parent: PrefixNode | None, tokens: bytes) -> PrefixNode | None:
        if identity in self._nodes:
            return self._find(identity, parent, tokens)
        node = self._nodes[identity] = PrefixNode(identity, parent, tokens, self._num_groups)
        if parent is not None:
            parent.children.add(node)
        return node
