// The plan of one step, as one flat buffer that host and device read alike.
//
// A plan says which query tokens may see which slots of which pages. It is built once per step (and
// per distinct sliding window and GQA group), and every layer reuses it. The buffer is an array of
// 64-bit words: a PlanHeader, then sections at the word offsets that the header names. All records
// are plain integers, so a kernel reads them in place.
//
// * blocks[num_blocks], PlanBlock: at most 64 query tokens that work items serve together
// * tokens[num_block_tokens], int32: row of the step, and so of the output, of each token of each
//   block
// * q_rows[num_block_tokens], int32: row of the query tensor that the token reads: its own, or
//   num_tokens + i, the copy that rotation i makes. A plan without rotations shares the section
//   `tokens`
// * rotations[num_rotations], PlanRotation: queries that see some slots at a shifted position
// * positions[num_block_tokens], int32: position of that query, shift taken off, for sliding
// windows
// * items[num_items], PlanItem: a row block and consecutive runs
// * runs[num_runs], PlanRun: slots, and which of the block's tokens see them
// * pages[num_pages], int32: physical pages; a run indexes into this list. A plan whose page lists
//   stay on the device (num_pages = 0) comes with them as an array of its own
// * words[num_words], uint64: per-slot visibility words of kPerSlot and kGather runs
// * gather[num_gather], int32: slots (page * page_size + offset) of kGather runs, one by one
// * spans[num_spans + 1], int32: first item of each span, and the end; spans are predicted to take
//   the same time, and one worker takes one span for one KV head
// * merge_indptr[num_tokens + 1], int32: CSR over query rows into merge_rows
// * merge_rows[num_merge_rows], int32: partial rows that make up a query row, in merge order
//
// Every query row is in some block of some item, be it an item without runs.
//
// A query row served by exactly one item is written directly by it (its CSR range is empty). A row
// served by several items has one partial row in each; partial row r holds (num_q_heads,
// head_dim_v) fp32 values and num_q_heads natural-log LSEs.
//
// A batch-invariant plan (tile_slots > 0) promises more, so that a row's result depends on its own
// context alone: see docs/plan.md.
#pragma once

#include <cstdint>

namespace fork_attn {

constexpr int32_t kPlanMagic = 0x4641504c;  // "FAPL"
constexpr int32_t kPlanVersion = 2;
constexpr int kMaxBlockTokens = 64;  // one bit of a visibility word each

struct PlanHeader {
  int32_t magic;
  int32_t version;
  int32_t total_words;  // size of the whole buffer in 64-bit words
  int32_t num_tokens;   // query rows of the step
  int32_t num_blocks;
  int32_t num_block_tokens;
  int32_t num_items;
  int32_t num_runs;
  int32_t num_pages;
  int32_t num_words;
  int32_t num_partial_rows;
  int32_t num_merge_rows;
  int32_t group;  // query heads per KV head
  int32_t page_size;
  int32_t window;            // sliding window in positions, 0 = none
  int32_t page_limit;        // above every page named: caches must have at least as many
  int32_t max_block_tokens;  // the largest block
  int32_t off_blocks;        // section offsets, in 64-bit words
  int32_t off_tokens;
  int32_t off_positions;
  int32_t off_items;
  int32_t off_runs;
  int32_t off_pages;
  int32_t off_words;
  int32_t off_merge_indptr;
  int32_t off_merge_rows;
  int32_t num_spans;
  int32_t off_spans;
  int32_t off_q_rows;
  int32_t num_rotations;
  int32_t off_rotations;
  int32_t num_gather;
  int32_t off_gather;
  int32_t tile_slots;      // of a batch-invariant plan: every run begins a tile of so many; else 0
  int32_t max_merge_rows;  // partial rows of the tokens of one block, at most
  int32_t reserved[13];
};
static_assert(sizeof(PlanHeader) == 192);

// Query row num_tokens + i is query row `row` moved back by `shift` positions: keys that it meets
// stand `shift` positions later in its context than where they were written.
struct PlanRotation {
  int32_t row;
  int32_t shift;
};

struct PlanBlock {
  int32_t token_begin;  // into tokens and positions
  int32_t num_tokens;   // 1..kMaxBlockTokens
};

struct PlanItem {
  int32_t block;
  int32_t run_begin;
  int32_t run_end;
  int32_t partial_begin;  // token t of the block writes partial row partial_begin + t; -1: the
                          // final output
};

// Visibility of slot j (0 <= j < num_slots) for token t of the block is the conjunction of
//   bit t of `mask`;
//   kDiagonal: j < diag + t;
//   kWindow:   positions[t] - (first_position + j) < window;
//   kPerSlot, kGather: bit t of words[words_begin + j].
// Slot j of a kGather run, which has no other kind, is gather[page_begin + j]: short pieces that
// share tiles.
enum PlanRunKind : int32_t { kFull = 0, kDiagonal = 1, kWindow = 2, kPerSlot = 4, kGather = 8 };

struct PlanRun {
  uint64_t mask;
  int32_t page_begin;  // slot j lies in page pages[page_begin + (first_slot + j) / page_size]
  int32_t first_slot;  // 0..page_size-1
  int32_t num_slots;   // >= 1
  int32_t first_position;
  int32_t kind;  // PlanRunKind bits
  int32_t diag;
  int32_t words_begin;
  int32_t chunk;  // of a batch-invariant plan: which cut of the context; else 0
};
static_assert(sizeof(PlanRun) == 40);

}  // namespace fork_attn
