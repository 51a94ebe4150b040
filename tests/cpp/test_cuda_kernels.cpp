// Every kernel of csrc/cuda, emulated on the CPU, against the CPU kernels: the same bytes.
// `test_cuda_kernels [seed]`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "cpu/kv_units.h"
#include "cuda/cache_kernels.h"

namespace {

using namespace fork_attn;
using namespace fork_attn::cpu;
using Bytes = std::vector<unsigned char>;

constexpr cuda::Stream kStream{0, nullptr};
constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3};

std::mt19937_64 rng;
std::string scene;

int64_t below(int64_t n) { return static_cast<int64_t>(rng() % static_cast<uint64_t>(n)); }

int64_t size_of(DType type) {
  return type == DType::kFloat32 ? 4 : type == DType::kFloat8E4M3 ? 1 : 2;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s\n", scene.c_str(), what);
  std::exit(1);
}

// Any bits: every NaN, Inf and subnormal of the type among them.
Bytes random_bytes(int64_t count) {
  Bytes bytes(count);
  for (unsigned char& b : bytes) b = static_cast<unsigned char>(rng());
  return bytes;
}

std::vector<float> random_floats(int64_t count, float low, float high) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> values(count);
  for (float& x : values) x = uniform(rng);
  return values;
}

// `count` different slots of [0, limit).
std::vector<int64_t> distinct(int64_t count, int64_t limit) {
  std::vector<int64_t> all(limit);
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), rng);
  all.resize(count);
  return all;
}

struct Scene {
  KvShape shape;
  int64_t num_pages;
  bool heads_inside;  // pages hold heads, then slots; else slots, then heads
  int64_t offset;     // elements by which everything is off its alignment

  PagedTensor paged(Bytes& data, int64_t dim, DType type) const {
    const int64_t page = int64_t{shape.page_size} * shape.num_heads * dim;
    void* base = data.data() + offset * size_of(type);
    if (heads_inside) return {base, page, dim, shape.page_size * dim};
    return {base, page, shape.num_heads * dim, dim};
  }

  Bytes cache(int64_t dim, DType type) const {
    const int64_t slots = num_pages * shape.page_size;
    return random_bytes((slots * shape.num_heads * dim + offset) * size_of(type));
  }

  RowTensor rows(Bytes& data, int64_t dim, DType type) const {
    return {data.data() + offset * size_of(type), shape.num_heads * dim, dim};
  }

  Bytes row_data(int64_t dim, DType type) const {
    return random_bytes((shape.rows * shape.num_heads * dim + offset) * size_of(type));
  }
};

Scene random_scene() {
  const int32_t dims[] = {1, 6, 16, 64, 80, 96, 128};
  const int32_t page_sizes[] = {1, 3, 16};
  Scene s;
  s.shape = {1 + below(9), 1 + static_cast<int32_t>(below(3)), dims[below(7)], dims[below(7)],
             page_sizes[below(3)]};
  s.num_pages = 20;
  s.heads_inside = below(2) == 0;
  s.offset = below(4) == 0 ? 1 : 0;
  scene = std::to_string(s.shape.rows) + " rows, " + std::to_string(s.shape.num_heads) +
          " heads, dims " + std::to_string(s.shape.head_dim) + " " +
          std::to_string(s.shape.head_dim_v) + ", pages of " + std::to_string(s.shape.page_size) +
          (s.heads_inside ? ", heads inside" : "") + (s.offset ? ", off alignment" : "");
  return s;
}

struct Table {
  std::vector<float> cos, sin;
  std::vector<int64_t> rows;
  Rope rope;

  Table(const KvShape& shape, bool always) {
    const int32_t half = static_cast<int32_t>(
        below(2) == 0 ? shape.head_dim / 2 : below(shape.head_dim / 2 + 1) / 8 * 8);
    if (half == 0 || (!always && below(3) == 0)) {
      rope = {nullptr, nullptr, nullptr, 0, 0, false};
      return;
    }
    cos = random_floats(30 * half, -1.0f, 1.0f);
    sin = random_floats(30 * half, -1.0f, 1.0f);
    for (int64_t t = 0; t < shape.rows; ++t) rows.push_back(below(30));
    const int32_t rest = shape.head_dim - 2 * half;
    const int32_t start = static_cast<int32_t>(below(2) == 0 ? 0 : below(rest / 8 + 1) * 8);
    rope = {cos.data(), sin.data(), rows.data(), 2 * half, start, below(2) == 0};
    scene += ", rotary " + std::to_string(2 * half) + " from " + std::to_string(start) +
             (rope.interleaved ? " interleaved" : "");
  }
};

// NaN may have any payload after arithmetic: it is compared as NaN.
template <class T>
bool same_values(const Bytes& a, const Bytes& b) {
  for (std::size_t i = 0; i + sizeof(T) <= a.size(); i += sizeof(T)) {
    if (std::memcmp(&a[i], &b[i], sizeof(T)) == 0) continue;
    T x, y;
    std::memcpy(&x, &a[i], sizeof(T));
    std::memcpy(&y, &b[i], sizeof(T));
    const float f = to_float(x), g = to_float(y);
    if (f == f || g == g) return false;
  }
  return true;
}

bool same(const Bytes& a, const Bytes& b, DType type, int64_t offset) {
  const auto from = static_cast<std::ptrdiff_t>(offset * size_of(type));
  const Bytes x(a.begin() + from, a.end()), y(b.begin() + from, b.end());
  switch (type) {
    case DType::kFloat32:
      return same_values<float>(x, y);
    case DType::kBFloat16:
      return same_values<BFloat16>(x, y);
    case DType::kFloat16:
      return same_values<Float16>(x, y);
    default:
      return same_values<Float8E4M3>(x, y);
  }
}

void test_store(DType cache, DType rows) {
  const Scene s = random_scene();
  const Table table(s.shape, false);
  const std::vector<float> scales = random_floats(2 * s.shape.num_heads, 0.01f, 4.0f);
  std::vector<int64_t> slots = distinct(s.shape.rows, s.num_pages * s.shape.page_size);
  slots[below(s.shape.rows)] = -1;
  Bytes k = s.row_data(s.shape.head_dim, rows), v = s.row_data(s.shape.head_dim_v, rows);
  Bytes k_cache = s.cache(s.shape.head_dim, cache), v_cache = s.cache(s.shape.head_dim_v, cache);
  Bytes k_other = k_cache, v_other = v_cache;
  StoreKvParams p{s.shape,
                  s.rows(k, s.shape.head_dim, rows),
                  s.rows(v, s.shape.head_dim_v, rows),
                  s.paged(k_cache, s.shape.head_dim, cache),
                  s.paged(v_cache, s.shape.head_dim_v, cache),
                  slots.data(),
                  scales.data(),
                  scales.data() + s.shape.num_heads,
                  table.rope,
                  rows,
                  cache};
  store_kv(p);
  p.k_cache = s.paged(k_other, s.shape.head_dim, cache);
  p.v_cache = s.paged(v_other, s.shape.head_dim_v, cache);
  cuda::store_kv(p, kStream);
  expect(same(k_cache, k_other, cache, s.offset), "store_kv: K differs");
  expect(same(v_cache, v_other, cache, s.offset), "store_kv: V differs");
}

void test_gather(DType cache, DType rows) {
  const Scene s = random_scene();
  const std::vector<float> scales = random_floats(2 * s.shape.num_heads, 0.01f, 4.0f);
  std::vector<int64_t> slots;
  for (int64_t t = 0; t < s.shape.rows; ++t)
    slots.push_back(below(s.num_pages * s.shape.page_size + 3) - 3);
  Bytes k_cache = s.cache(s.shape.head_dim, cache), v_cache = s.cache(s.shape.head_dim_v, cache);
  Bytes k = s.row_data(s.shape.head_dim, rows), v = s.row_data(s.shape.head_dim_v, rows);
  Bytes k_other = random_bytes(k.size()), v_other = random_bytes(v.size());
  GatherKvParams p{s.shape,
                   s.paged(k_cache, s.shape.head_dim, cache),
                   s.paged(v_cache, s.shape.head_dim_v, cache),
                   s.rows(k, s.shape.head_dim, rows),
                   s.rows(v, s.shape.head_dim_v, rows),
                   slots.data(),
                   scales.data(),
                   scales.data() + s.shape.num_heads,
                   cache,
                   rows};
  gather_kv(p);
  p.k = s.rows(k_other, s.shape.head_dim, rows);
  p.v = s.rows(v_other, s.shape.head_dim_v, rows);
  cuda::gather_kv(p, kStream);
  expect(same(k, k_other, rows, s.offset), "gather_kv: K differs");
  expect(same(v, v_other, rows, s.offset), "gather_kv: V differs");
}

void test_shift(DType cache) {
  Scene s = random_scene();
  while (s.shape.head_dim < 2) s = random_scene();
  const Table table(s.shape, true);
  if (table.rope.rotary_dim == 0) return;
  std::vector<int64_t> from = distinct(2 * s.shape.rows, s.num_pages * s.shape.page_size);
  std::vector<int64_t> to(from.begin() + s.shape.rows, from.end());
  for (int64_t t = 0; t < s.shape.rows; ++t) {
    if (below(3) == 0) to[t] = from[t];
  }
  const bool with_v = below(2) == 0;
  if (!with_v) s.shape.head_dim_v = 0;
  Bytes k_cache = s.cache(s.shape.head_dim, cache), v_cache = s.cache(s.shape.head_dim_v, cache);
  Bytes k_other = k_cache, v_other = v_cache;
  const PagedTensor none{nullptr, 0, 0, 0};
  ShiftRopeParams p{s.shape,
                    s.paged(k_cache, s.shape.head_dim, cache),
                    with_v ? s.paged(v_cache, s.shape.head_dim_v, cache) : none,
                    from.data(),
                    to.data(),
                    table.rope,
                    cache};
  shift_rope(p);
  p.k_cache = s.paged(k_other, s.shape.head_dim, cache);
  if (with_v) p.v_cache = s.paged(v_other, s.shape.head_dim_v, cache);
  cuda::shift_rope(p, kStream);
  expect(same(k_cache, k_other, cache, s.offset), "shift_rope: K differs");
  expect(same(v_cache, v_other, cache, s.offset), "shift_rope: V differs");
}

// Caches of different sizes; with `many`, more of them than one launch takes.
void test_copy_pages(bool many) {
  const int64_t num_pages = 12, count = many ? 3 : below(6);
  const int64_t num_caches = many ? 300 : 1 + below(5);
  const int64_t unit = below(2) == 0 ? 16 : 5;
  scene = std::to_string(count) + " pages of " + std::to_string(num_caches) + " caches";
  const std::vector<int64_t> pages = distinct(2 * count, num_pages);
  const std::vector<int32_t> from(pages.begin(), pages.begin() + count);
  const std::vector<int32_t> to(pages.begin() + count, pages.end());
  std::vector<Bytes> caches, others;
  std::vector<PageSpan> spans, other_spans;
  for (int64_t c = 0; c < num_caches; ++c) {
    const int64_t bytes = unit * (1 + below(many ? 3 : 1500));
    const int64_t stride = bytes + unit * below(3);
    caches.push_back(random_bytes(num_pages * stride));
    spans.push_back({nullptr, stride, bytes});
  }
  others = caches;
  other_spans = spans;
  for (int64_t c = 0; c < num_caches; ++c) {
    spans[c].data = reinterpret_cast<char*>(caches[c].data());
    other_spans[c].data = reinterpret_cast<char*>(others[c].data());
  }
  copy_pages(spans.data(), num_caches, from.data(), to.data(), count);
  cuda::copy_pages(other_spans.data(), num_caches, from.data(), to.data(), count, kStream);
  expect(caches == others, "copy_pages differs");
}

// Slots move over each other: an accepted path behind its branch's end.
void test_move_slots() {
  const int64_t num_pages = 10, num_caches = 1 + below(4), count = below(40);
  const int32_t page_size = 16, width = below(2) == 0 ? 16 : 3;
  scene = std::to_string(count) + " slots of " + std::to_string(num_caches) + " caches";
  std::vector<int64_t> from = distinct(count, num_pages * page_size);
  std::vector<int64_t> to = distinct(count, num_pages * page_size);
  std::vector<Bytes> caches, others;
  std::vector<SlotSpan> spans, other_spans;
  for (int64_t c = 0; c < num_caches; ++c) {
    const int32_t heads = 1 + static_cast<int32_t>(below(3));
    const int32_t row = width * (1 + static_cast<int32_t>(below(count > 20 ? 200 : 9)));
    caches.push_back(random_bytes(int64_t{num_pages} * page_size * heads * row));
    spans.push_back(
        {nullptr, int64_t{page_size} * heads * row, row, int64_t{page_size} * row, heads, row});
  }
  others = caches;
  other_spans = spans;
  for (int64_t c = 0; c < num_caches; ++c) {
    spans[c].data = reinterpret_cast<char*>(caches[c].data());
    other_spans[c].data = reinterpret_cast<char*>(others[c].data());
  }
  move_slots(spans.data(), num_caches, page_size, from.data(), to.data(), count);
  cuda::move_slots(other_spans.data(), num_caches, page_size, from.data(), to.data(), count,
                   kStream);
  expect(caches == others, "move_slots differs");
}

void test_too_many_moves() {
  scene = "too many moves";
  const SlotSpan span{nullptr, 0, 0, 0, 1, 16};
  try {
    cuda::move_slots(&span, 1, 16, nullptr, nullptr, cuda::kMaxMoves + 1, kStream);
  } catch (const Error& e) {
    expect(e.kind == ErrorKind::kValue, "expected a value error");
    return;
  }
  expect(false, "expected an error");
}

void test_merge() {
  const int64_t states = 1 + below(6), rows = 1 + below(5);
  const int32_t heads = 1 + static_cast<int32_t>(below(3));
  const int32_t dim = below(2) == 0 ? 64 : 7;
  scene = std::to_string(states) + " states of dim " + std::to_string(dim);
  const int64_t count = rows * heads;
  std::vector<float> out = random_floats(states * count * dim, -3.0f, 3.0f);
  std::vector<float> lse = random_floats(states * count, -20.0f, 20.0f);
  for (int64_t i = 0; i < states * count; ++i) {
    if (below(4) != 0 && i % count != 0) continue;
    lse[i] = -HUGE_VALF;
    std::fill_n(out.begin() + i * dim, dim, NAN);  // what an empty state holds does not matter
  }
  std::vector<float> merged(count * dim), merged_lse(count), other(count * dim), other_lse(count);
  merge_states(out.data(), lse.data(), states, rows, heads, dim, merged.data(), merged_lse.data());
  cuda::merge_states(out.data(), lse.data(), DType::kFloat32, states, rows, heads, dim,
                     other.data(), other_lse.data(), kStream);
  for (int64_t i = 0; i < count * dim; ++i)
    expect(std::abs(merged[i] - other[i]) <= 1e-6f, "merge_states differs");
  expect(merged_lse == other_lse, "merge_states: lse differs");
  std::vector<BFloat16> narrow(out.size()), narrow_merged(count * dim);
  for (std::size_t i = 0; i < out.size(); ++i) from_float(out[i], narrow[i]);
  cuda::merge_states(narrow.data(), lse.data(), DType::kBFloat16, states, rows, heads, dim,
                     narrow_merged.data(), other_lse.data(), kStream);
  for (int64_t i = 0; i < count * dim; ++i)
    expect(std::abs(merged[i] - to_float(narrow_merged[i])) <= 0.03f, "merge_states of bf16");
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  rng.seed(seed);
  for (int round = 0; round < 25; ++round) {
    for (DType type : kTypes) {
      test_gather(type, type);
      test_shift(type);
      if (type == DType::kFloat8E4M3) continue;
      test_store(type, type);
      test_store(DType::kFloat8E4M3, type);
      test_gather(DType::kFloat8E4M3, type);
    }
    test_copy_pages(round == 0);
    test_move_slots();
    test_merge();
  }
  test_too_many_moves();
  return 0;
}
