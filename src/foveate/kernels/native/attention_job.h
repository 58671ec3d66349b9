// What every attention without gradients is given, and how threads share it. The including file defines Number.
#pragma once
#include "common.h"

typedef struct {
    const Number *q, *k, *v;
    Number *out;
    float *lse;
    float scale;
    Queue queue;
    int64_t heads, queries, keys, width, parts;
    int64_t q_row, q_token, q_head, k_row, k_head, k_token, v_row, v_head, v_token, out_row, out_token, out_head;
    // How many keys a query sees, those behind them being masked, or NULL; by AMX only.
    const int32_t *counts;
    int64_t count_row, count_token;
    atomic_int failed;
} Job;

// `job` has pointers and scale. dims: rows, heads, queries, keys, width (a multiple of 16). strides, in elements: q row,
// token, head; keys row, head, token; values row, head, token; out row, token, head. A width lies together everywhere.
// lse: NULL, or room for the natural log-sum-exp of the scores, [rows][queries][heads]. Returns 1 without memory, else 0.
static int64_t attend(void (*work)(void *), Job job, const int64_t *dims, const int64_t *strides, int64_t threads) {
    int64_t pairs = dims[0] * dims[1];
    // Each part of the queries packs the keys again, so a head is only split where heads do not share out evenly.
    job.parts = pairs % threads && pairs < 8 * threads ? threads : 1;
    job.queue = (Queue){.count = pairs * job.parts, .slice = 1};
    job.heads = dims[1], job.queries = dims[2], job.keys = dims[3], job.width = dims[4];
    job.q_row = strides[0], job.q_token = strides[1], job.q_head = strides[2];
    job.k_row = strides[3], job.k_head = strides[4], job.k_token = strides[5];
    job.v_row = strides[6], job.v_head = strides[7], job.v_token = strides[8];
    job.out_row = strides[9], job.out_token = strides[10], job.out_head = strides[11];
    run(work, &job, threads);
    return atomic_load(&job.failed);
}
