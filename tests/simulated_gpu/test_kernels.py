# ruff: noqa: E501 (tables of PTX)
"""What a kernel may do with memory and with other threads, and what is found of what it may not: bounds, races,
barriers that nobody reaches. Each fault is planted beside its right form, and found at every order of blocks and threads.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.simulated_gpu import kernel_support
from tests.simulated_gpu.kernel_support import Fault, Memory, Race, Range

pytestmark = pytest.mark.skipif(kernel_support.COMPILER is None, reason="no g++ on PATH")

SEEDS = range(4)
REGISTERS = """
    .reg .pred %p<10>; .reg .b16 %h<10>; .reg .b32 %r<20>; .reg .b64 %q<20>;
    .reg .b32 %tid, %ctaid, %lane; .reg .b64 %a, %b, %c, %at;
    mov.u32 %tid, %tid.x; mov.u32 %ctaid, %ctaid.x; mov.u32 %lane, %laneid;
"""
# %r0: of all threads, %at: four bytes for each
GLOBAL_INDEX = "mov.u32 %r1, %ntid.x; mad.lo.s32 %r0, %ctaid, %r1, %tid; mul.wide.u32 %at, %r0, 4;"


def kernel(folder: Path, body: str, parameters: str = "a", variables: str = "") -> Path:
    """A kernel named `kernel`; its parameters are 64 bits each, in registers of their names."""
    declared = ", ".join(f".param .u64 {name}" for name in parameters)
    loads = " ".join(f"ld.param.u64 %{name}, [{name}];" for name in parameters)
    path = folder / "kernel.ptx"
    path.write_text(
        f".version 8.8\n.target sm_90\n.address_size 64\n{variables}\n.visible .entry kernel({declared})\n{{"
        f"{REGISTERS}{loads}\n{body}\nret;\n}}\n"
    )
    return path


def run(path: Path, *parameters: Memory | int, seed: int = 0, block: int = 32, grid: int = 1, **options: int):
    words = [each if isinstance(each, int) else each.address for each in parameters]
    return kernel_support.launch(path, "kernel", struct.pack(f"<{len(words)}Q", *words), (grid,), (block,), seed=seed,
                                 **options)  # fmt: skip


def words(memory: Memory) -> list[int]:
    return list(struct.unpack(f"<{memory.bytes // 4}I", memory.read()))


def zeros(count: int, device: int = 0) -> Memory:
    return Memory(bytes(4 * count), device)


# --- memory


def test_what_was_touched_is_told_to_the_byte(tmp_path):
    path = kernel(tmp_path, f"{GLOBAL_INDEX} cvt.u16.u32 %h1, %r0; add.s64 %q1, %a, %at; ld.global.u8 %h2, [%q1+1];"
                            "add.s64 %q2, %b, %at; st.global.u16 [%q2+2], %h1;", "ab")  # fmt: skip
    a, b = zeros(40), zeros(40)
    touched = run(path, a, b, block=20, grid=2)
    assert [each for each in touched if each.begin < a.address + 160 and each.end > a.address] == [
        Range(a.address + 4 * i + 1, a.address + 4 * i + 2, False) for i in range(40)
    ]
    assert [each for each in touched if each.writes] == [
        Range(b.address + 4 * i + 2, b.address + 4 * i + 4, True) for i in range(40)
    ]


@pytest.mark.parametrize(
    ("load", "right"),
    [
        ("ld.global.s8 %q1, [%a+2]; st.global.b64 [%b], %q1;", "ffffffffffffff82"),
        ("ld.global.u8 %q1, [%a+2]; st.global.b64 [%b], %q1;", "82"),
        ("ld.global.s16 %q1, [%a+2]; st.global.b64 [%b], %q1;", "ffffffffffff8382"),
        ("ld.global.s32 %q1, [%a]; st.global.b64 [%b], %q1;", "ffffffff83828180"),
        ("ld.global.v2.u8 {%h1, %h2}, [%a+2]; mov.b32 %r1, {%h1, %h2}; st.global.b32 [%b], %r1;", "830082"),
        ("ld.global.cg.v2.b32 {%r1, %r2}, [%a]; mov.b64 %q1, {%r2, %r1}; st.global.b64 [%b], %q1;", "8382818087868584"),
        ("ld.global.L1::evict_last.v4.b32 {%r1, _, _, %r2}, [%a]; st.global.v2.b32 [%b], {%r2, %r1};", "838281808f8e8d8c"),
        ("ld.u64 %q1, [%a]; st.u64 [%b], %q1;", "8786858483828180"),
        ("ld.global.b64 %q1, [%a]; mov.b64 {_, %r1}, %q1; st.global.b32 [%b], %r1;", "87868584"),
        ("mov.u64 %q1, number; ld.const.u32 %r1, [%q1+4]; st.global.u32 [%b], %r1;", "5"),
        ("mov.u64 %q1, number; cvta.const.u64 %q2, %q1; ld.u16 %h1, [%q2]; st.global.u16 [%b], %h1;", "fffe"),
        ("mov.u64 %q1, b; ld.param.v2.u32 {%r1, %r2}, [%q1+-8]; mov.b64 %q2, {%r1, %r2}; sub.s64 %q3, %q2, %a;"
         "st.global.u64 [%b], %q3;", "0"),
        (".local .align 8 .b8 own[16]; .reg .b64 own; mov.u64 own, 7; st.global.u64 [%b], own;", "7"),
        (".local .align 8 .b8 depot[16]; mov.u64 %q1, depot; cvta.local.u64 %q2, %q1; mov.u32 %r1, 9;"
         "st.u32 [%q2+12], %r1; ld.local.u32 %r2, [%q1+12]; st.global.u32 [%b], %r2;", "9"),
    ],
)  # fmt: skip
def test_loads_and_stores(tmp_path, load, right):
    path = kernel(tmp_path, f"{{ {load} }}", "ab", ".const .align 4 .u32 number[2] = {-2, 5};")
    a, b = Memory(bytes(range(0x80, 0x90))), Memory(bytes(8))
    run(path, a, b, block=1)
    assert int.from_bytes(b.read(), "little") == int(right, 16)


@pytest.mark.parametrize(
    ("access", "found"),
    [
        ("ld.global.u32 %r1, [%a+60];", None),
        ("ld.global.u32 %r1, [%a+64];", "0 bytes beyond the end of 64 bytes"),
        ("st.global.v2.u32 [%a+64], {%r1, %r1};", "0 bytes beyond the end of 64 bytes"),
        ("ld.global.u32 %r1, [%a+-4];", "no memory of a GPU is there"),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%a+16];", None),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%a+20];", "not a multiple of 16"),
        ("ld.global.u16 %h1, [%a+1];", "not a multiple of 2"),
        ("ld.global.u32 %r1, [0];", "4 bytes at 0"),
        ("atom.global.add.u32 %r1, [%a+64], 1;", "0 bytes beyond the end of 64 bytes"),
        ("ld.shared.u32 %r1, [words+28];", None),
        ("ld.shared.u32 %r1, [words+32];", "of the 32 of shared memory"),
        ("ld.param.u32 %r1, [a+8];", "parameters out of bounds"),
        ("mov.u64 %q1, a; cvta.param.u64 %q2, %q1; st.u32 [%q2], %r1;", "which is constant"),
        ("trap;", "a trap"),
    ],
)
def test_accesses_out_of_bounds_and_misaligned(tmp_path, access, found):
    path = kernel(tmp_path, f"setp.eq.u32 %p1, %tid, 3; @!%p1 bra $end; {access} $end:", "a",
                  ".shared .align 8 .b8 words[32];")  # fmt: skip
    a = zeros(16)
    if found is None:
        run(path, a)
        return
    with pytest.raises(Fault) as fault:
        run(path, a)
    said = str(fault.value)
    assert (
        found in said
        and "kernel, block (0, 0, 0), thread (3, 0, 0), line " in said
        and access.rstrip(";").split("; ")[-1] in said
    )


def test_memory_of_another_device_freed_and_pinned(tmp_path):
    path = kernel(tmp_path, "ld.global.u32 %r1, [%a];")
    with pytest.raises(Fault, match="of device 1, and the kernel runs on device 0"):
        run(path, zeros(1, device=1))
    run(path, zeros(1, device=1), device=1)
    run(path, zeros(1, device=-1))
    freed = zeros(1)
    freed.free()
    with pytest.raises(Fault, match="which have been freed"):
        run(path, freed)


# --- lanes and barriers


def shuffled(kind: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """As the manual's pseudocode has it."""
    clamp, segment = c & 31, c >> 8 & 31
    most, least = (lane & segment) | (clamp & ~segment), lane & segment
    at = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment & 31)}[kind]
    is_in = at >= most if kind == "up" else at <= most
    return (at if is_in else lane), is_in


@pytest.mark.parametrize("kind", ["up", "down", "bfly", "idx"])
def test_shuffles(tmp_path, kind):
    path = kernel(tmp_path, f"""{GLOBAL_INDEX} add.u32 %r2, %r0, 100; cvt.u32.u64 %r3, %b; cvt.u32.u64 %r4, %c;
        shfl.sync.{kind}.b32 %r5|%p1, %r2, %r3, %r4, -1; selp.u32 %r6, 1000, 0, %p1; add.u32 %r5, %r5, %r6;
        add.s64 %q1, %a, %at; st.global.u32 [%q1], %r5;""", "abc")  # fmt: skip
    a = zeros(64)
    for _ in range(12):
        b = random.randrange(32)
        c = (0 if kind == "up" else 31) | random.choice([0, 0x18, 0x1C, 0x10]) << 8
        run(path, a, b, c, block=64, seed=random.randrange(2**32))
        right = [shuffled(kind, i % 32, b, c) for i in range(64)]
        assert words(a) == [100 + i // 32 * 32 + at + 1000 * is_in for i, (at, is_in) in enumerate(right)], (b, c)


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("redux.sync.max.s32 %r3, %r2, -1;", lambda given, i: max(given)),
        ("redux.sync.add.u32 %r3, %r2, -1;", lambda given, i: sum(given)),
        ("redux.sync.xor.b32 %r3, %r2, -1;", lambda given, i: given[0] ^ given[31] ^ _xor(given[1:31])),
        ("vote.sync.ballot.b32 %r3, %p1, -1;", lambda given, i: sum((each > 50) << k for k, each in enumerate(given))),
        ("vote.sync.any.pred %p2, %p1, -1; selp.u32 %r3, 1, 0, %p2;", lambda given, i: any(each > 50 for each in given)),
        ("vote.sync.all.pred %p2, %p1, -1; selp.u32 %r3, 1, 0, %p2;", lambda given, i: all(each > 50 for each in given)),
        ("match.any.sync.b32 %r3, %r2, -1;", lambda given, i: sum((each == given[i]) << k for k, each in enumerate(given))),
        ("bar.red.popc.u32 %r3, 0, %p1;", lambda given, i: sum(each > 50 for each in given)),
        ("atom.global.add.u32 %r3, [%b], %r2; bar.sync 0; ld.relaxed.gpu.global.u32 %r3, [%b];", lambda given, i: sum(given)),
        ("atom.shared.max.u32 %r3, [word], 0; bar.sync 0; atom.shared::cta.exch.b32 %r3, [word], 7; bar.sync 0;"
         "ld.volatile.shared.u32 %r3, [word];", lambda given, i: 7),
    ],
)  # fmt: skip
def test_what_lanes_tell_one_another(tmp_path, code, right):
    path = kernel(tmp_path, f"""{GLOBAL_INDEX} add.s64 %q1, %a, %at; ld.global.u32 %r2, [%q1]; setp.gt.u32 %p1, %r2, 50;
        {code} st.global.u32 [%q1], %r3;""", "ab", ".shared .align 4 .b32 word;")  # fmt: skip
    for seed in SEEDS:
        given = [random.randrange(60) for _ in range(32)]
        a = Memory(struct.pack("<32I", *given))
        run(path, a, zeros(1), seed=seed)
        assert words(a) == [int(right(given, i)) for i in range(32)]


def _xor(values: list[int]) -> int:
    result = 0
    for value in values:
        result ^= value
    return result


def test_atomics_give_what_was_there(tmp_path):
    operations = {
        "add.u32": lambda old, new: (old + new) % 2**32,
        "inc.u32": lambda old, new: 0 if old >= new else old + 1,
        "dec.u32": lambda old, new: new if old == 0 or old > new else old - 1,
        "min.s32": lambda old, new: min(old, new, key=lambda bits: bits - 2**32 * (bits >= 2**31)),
        "max.u32": max,
        "and.b32": lambda old, new: old & new,
        "xor.b32": lambda old, new: old ^ new,
        "exch.b32": lambda old, new: new,
    }
    body = "".join(
        f"ld.global.u32 %r1, [%a+{4 * i}]; atom.global.{name} %r2, [%b+{4 * i}], %r1; st.global.u32 [%a+{4 * i}], %r2;"
        for i, name in enumerate(operations)
    )
    cas = "mov.u32 %r1, 3; mov.u32 %r2, 4; atom.acq_rel.gpu.global.cas.b32 %r3, [%b+{0}], %r1, %r2;"
    path = kernel(tmp_path, body + cas.format(4 * len(operations)) + cas.format(4 * len(operations) + 4), "ab")
    new, old = ([random.choice([0, 1, 5, 2**31, 2**32 - 1]) for _ in operations] for _ in range(2))
    a, b = Memory(struct.pack(f"<{len(new)}I", *new)), Memory(struct.pack(f"<{len(old) + 2}I", *old, 3, 5))
    run(path, a, b, block=1)
    assert words(a) == old
    results = [operation(*pair) for operation, *pair in zip(operations.values(), old, new, strict=True)]
    assert words(b) == [*results, 4, 5]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("bar.sync 0;", None),
        ("setp.lt.u32 %p1, %tid, 32; @%p1 bar.sync 1; bar.sync 0;", "all threads wait"),
        ("setp.lt.u32 %p1, %tid, 16; @%p1 bar.sync 0; @!%p1 bar.sync 0;", "a thread of the same warp waits at another"),
        ("setp.lt.u32 %p1, %tid, 32; @%p1 bar.sync 1, 32; bar.sync 0;", None),
        ("bar.sync 1, 96;", "all threads wait"),
        ("bar.sync 1, 40;", "no multiple of a warp"),
        ("setp.lt.u32 %p1, %tid, 32; @%p1 bar.arrive 2, 64; @!%p1 bar.sync 2, 64;", None),
        ("setp.eq.u32 %p1, %lane, 5; @%p1 shfl.sync.idx.b32 %r1, %r2, 0, 31, -1; bar.sync 0;", "all threads wait"),
        ("shfl.sync.idx.b32 %r1, %r2, 0, 31, 1;", "not in its own mask"),
        ("setp.eq.u32 %p1, %lane, 5; @%p1 ret; bar.warp.sync -1; bar.sync 0;", None),  # who has ended is not waited for
    ],
)
def test_barriers_that_not_all_reach(tmp_path, code, found):
    path = kernel(tmp_path, code, "")
    for seed in SEEDS:
        if found is None:
            run(path, seed=seed, block=64)
        else:
            with pytest.raises(Fault, match=found):
                run(path, seed=seed, block=64)


# --- races in a block

EXCHANGE = "shl.b32 %r2, %tid, 2; mov.u32 %r3, word; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %tid; {order}" \
           "xor.b32 %r5, %r2, {other}; add.u32 %r6, %r3, %r5; ld.shared.u32 %r7, [%r6];"  # fmt: skip


@pytest.mark.parametrize(
    ("code", "races"),
    [
        (EXCHANGE.format(order="bar.sync 0;", other=128), False),
        (EXCHANGE.format(order="", other=128), True),
        (EXCHANGE.format(order="bar.warp.sync -1;", other=128), True),  # another warp's
        (EXCHANGE.format(order="bar.warp.sync -1;", other=4), False),
        (EXCHANGE.format(order="", other=4), True),
        (EXCHANGE.format(order="membar.gl;", other=4), True),
        (EXCHANGE.format(order="shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;", other=4), True),
        (EXCHANGE.format(order="setp.lt.u32 %p1, %tid, 32; @%p1 bar.sync 1, 32; @!%p1 bar.sync 2, 32;", other=4), False),
        (EXCHANGE.format(order="setp.lt.u32 %p1, %tid, 32; @%p1 bar.sync 1, 32; @!%p1 bar.sync 2, 32;", other=128), True),
        # read by all, then written by one
        ("ld.shared.u32 %r1, [word]; setp.eq.u32 %p1, %lane, 0; bar.sync 0; setp.eq.u32 %p1, %tid, 0;"
         "@%p1 st.shared.u32 [word], %r1;", False),
        ("ld.shared.u32 %r1, [word]; setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.u32 [word], %r1;", True),
        # in a warp, what it has of a shuffle was made of what the others read
        ("shr.u32 %r8, %tid, 5; shl.b32 %r8, %r8, 2; mov.u32 %r9, word; add.u32 %r9, %r9, %r8; ld.shared.u32 %r1, [%r9];"
         "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; setp.eq.u32 %p1, %lane, 0; @%p1 st.shared.u32 [%r9], %r2;", False),
        # the same by all lanes of a warp; or of two
        ("mov.u32 %r1, 5; setp.lt.u32 %p1, %tid, 32; @%p1 st.shared.u32 [word], %r1;", False),
        ("setp.lt.u32 %p1, %tid, 32; @%p1 st.shared.u32 [word], %tid;", True),
        ("mov.u32 %r1, 5; st.shared.u32 [word], %r1;", True),
        # bytes beside each other are each their own
        ("mov.u32 %r3, word; add.u32 %r4, %r3, %tid; st.shared.u8 [%r4], %r1; ld.shared.u8 %r2, [%r4];", False),
        ("mov.u32 %r3, word; add.u32 %r4, %r3, %tid; st.shared.u8 [%r4], %r1; and.b32 %r4, %r4, -4; ld.shared.u32 %r2, [%r4];", True),
        # of a vector only its first word is looked at
        ("mov.u32 %r3, word; shl.b32 %r2, %tid, 2; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r1; and.b32 %r5, %tid, 1;"
         "setp.eq.u32 %p1, %r5, 1; @%p1 bra $end; .pragma \"used_bytes_mask 15\"; ld.shared.v2.u32 {%r6, %r7}, [%r4]; $end:", False),
        ("mov.u32 %r3, word; shl.b32 %r2, %tid, 2; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r1; and.b32 %r5, %tid, 1;"
         "setp.eq.u32 %p1, %r5, 1; @%p1 bra $end; ld.shared.v2.u32 {%r6, %r7}, [%r4]; $end:", True),
        ("atom.shared.add.u32 %r1, [word], 1;", False),
        ("atom.shared.add.u32 %r1, [word], 1; ld.shared.u32 %r1, [word];", True),
    ],
)  # fmt: skip
def test_races_between_threads_of_a_block(tmp_path, code, races):
    path = kernel(tmp_path, code, "", ".shared .align 8 .b32 word[64];")
    for seed in SEEDS:
        if races:
            with pytest.raises(Race, match="of shared memory, which block"):
                run(path, block=64, seed=seed)
        else:
            run(path, block=64, seed=seed)


# --- races between blocks

GRID, BLOCK = 5, 64
# The block that is last adds up what all have written, as csrc's norm does.
LAST_BLOCK = """
    {index} add.s64 %q1, %a, %at; mov.u32 %r2, 1; st.global.u32 [%q1], %r2;
    {written} {first_barrier}
    setp.ne.u32 %p1, %tid, 0; @%p1 bra $counted;
    {before} mov.u32 %r4, %nctaid.x; sub.u32 %r4, %r4, 1; atom{order}.global.inc.u32 %r5, [%b], %r4; {after}
    setp.eq.u32 %p2, %r5, %r4; selp.u32 %r6, 1, 0, %p2; st.shared.u32 [last], %r6;
$counted:
    {second_barrier} ld.shared.u32 %r6, [last]; setp.eq.u32 %p2, %r6, 0; @%p2 ret;
    {read}
    mul.wide.u32 %q2, %tid, 4; add.s64 %q3, %a, %q2; mov.u32 %r7, 0; mov.u32 %r8, 0;
$next:
    ld.global.cg.u32 %r9, [%q3]; add.u32 %r7, %r7, %r9; add.s64 %q3, %q3, 256; add.u32 %r8, %r8, 1;
    mov.u32 %r4, %nctaid.x; setp.lt.u32 %p3, %r8, %r4; @%p3 bra $next;
    add.s64 %q4, %c, %q2; st.global.u32 [%q4], %r7;
"""
RIGHT = {
    "index": GLOBAL_INDEX, "written": "", "first_barrier": "bar.sync 0;", "before": "", "order": "", "after": "",
    "second_barrier": "bar.sync 0;", "read": "",
}  # fmt: skip
FENCE = "membar.gl;"


@pytest.mark.parametrize(
    ("parts", "races"),
    [
        # fences of all threads, before and after: sequential ones, as __threadfence() is
        ({"written": FENCE, "read": FENCE}, None),
        ({"written": FENCE}, "of global memory"),
        ({"read": FENCE}, "of global memory"),
        ({"written": FENCE, "read": "membar.cta;"}, "of global memory"),
        ({"written": FENCE, "read": FENCE, "first_barrier": ""}, "of global memory"),
        ({"written": FENCE, "read": FENCE, "second_barrier": ""}, "of shared memory"),
        # a barrier and one thread's fence: what the others wrote goes with it
        ({"before": FENCE, "after": FENCE}, None),
        ({"before": "fence.acq_rel.gpu;", "after": "fence.acq_rel.gpu;"}, None),
        ({"before": FENCE}, "of global memory"),
        ({"after": FENCE}, "of global memory"),
        ({"before": FENCE, "after": FENCE, "first_barrier": ""}, "of global memory"),
        # an atomic that is both
        ({"order": ".acq_rel.gpu"}, None),
        ({"order": ".release.gpu"}, "of global memory"),
        ({"order": ".acquire.gpu"}, "of global memory"),
        ({"order": ".relaxed.gpu"}, "of global memory"),
        ({"order": ".acq_rel.gpu", "first_barrier": ""}, "of global memory"),
    ],
)
def test_the_last_block_reads_what_the_others_wrote(tmp_path, parts, races):
    path = kernel(tmp_path, LAST_BLOCK.format(**(RIGHT | parts)), "abc", ".shared .align 4 .b32 last;")
    for seed in SEEDS:
        a, b, c = zeros(GRID * BLOCK), zeros(1), zeros(BLOCK)
        if races:
            with pytest.raises(Race, match=races):
                run(path, a, b, c, seed=seed, block=BLOCK, grid=GRID)
        else:
            run(path, a, b, c, seed=seed, block=BLOCK, grid=GRID)
            assert words(c) == [GRID] * BLOCK and words(b) == [0]


@pytest.mark.parametrize(
    ("code", "races"),
    [
        (f"{GLOBAL_INDEX} add.s64 %q1, %a, %at; ld.global.u32 %r2, [%q1]; st.global.u32 [%q1], %r2; ld.global.u32 %r3, [%b];", False),
        (f"{GLOBAL_INDEX} shr.u64 %at, %at, 3; shl.b64 %at, %at, 2; add.s64 %q1, %a, %at; st.global.u32 [%q1], %r0;", True),
        (f"{GLOBAL_INDEX} add.s64 %q1, %a, %at; ld.global.u32 %r2, [%q1]; st.global.u32 [%a], %r2;", True),
        ("st.relaxed.gpu.global.u32 [%a], %tid;", False),
        ("atom.global.add.u32 %r1, [%a], 1; ld.relaxed.gpu.global.u32 %r2, [%a];", False),
        ("atom.global.add.u32 %r1, [%a], 1; ld.global.u32 %r2, [%a];", True),
        ("ld.global.u32 %r2, [%a]; red.global.add.u32 [%a], 1;", True),
    ],
)  # fmt: skip
def test_races_between_blocks(tmp_path, code, races):
    path = kernel(tmp_path, code, "ab")
    for seed in SEEDS:
        a, b = zeros(256), zeros(1)
        if races:
            with pytest.raises(
                Race, match=r"block \(\d, 0, 0\), thread \(\d+, 0, 0\), line .* of global memory, which block"
            ):
                run(path, a, b, seed=seed, block=32, grid=8)
        else:
            run(path, a, b, seed=seed, block=32, grid=8)


def test_registers_and_shared_memory_begin_as_garbage(tmp_path):
    path = kernel(tmp_path, "ld.shared.u32 %r1, [word]; st.global.v2.u32 [%a], {%r1, %r2};", "a", ".shared .b32 word;")
    found = set()
    for seed in SEEDS:
        a = zeros(2)
        run(path, a, seed=seed, block=1)
        found.add(tuple(words(a)))
    assert len(found) == len(SEEDS)
