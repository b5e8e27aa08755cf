from typing import TypedDict

class FormatRow(TypedDict):
    name: str
    type_id: int
    block_elems: int
    block_bytes: int
    group: int
    has_offset: bool
    is_plain: bool
    can_quantize: bool
    can_pack: bool

class RawBuildInfo(TypedDict):
    compiler: str
    cuda: str
    cuda_architectures: str
    torch_abi: str

class RawGemmChoice(TypedDict):
    algo: str
    reason: str
    obstacles: dict[str, str | None]
    rounding: list[str]

def format_table() -> list[FormatRow]: ...
def build_info() -> RawBuildInfo: ...
def select_gemm(
    m: int, n: int, k: int, qtype: int, dtype: str, arch: int, may_round: bool
) -> RawGemmChoice: ...
def select_packed_gemm(
    m: int, n: int, k: int, dtype: str, arch: int, may_round: bool
) -> RawGemmChoice: ...
