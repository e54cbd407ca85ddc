// Row sums and gradients of one vocabulary shard on a CPU: kernels/rows_cpp.py has the definitions.
//
// Every function reads its logits once. The sums are kept in each lane about the lane's own maxima, which a step
// of four vectors raises at most once; a tile's sums then join the row's, so that no float takes up more than a
// hundred terms, and the lanes are brought together in double.
#include "divergence.h"
#include "jsd_token.h"

namespace {

template <class F>
void each_row(long rows, int threads, F row) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long i = 0; i < rows; i++) row(i);
}

template <class T>
struct Type {
  using type = T;
};

template <class F>
void with_type(int half, F f) {
  half ? f(Type<bf16>{}) : f(Type<float>{});
}

template <class F>
void with_types(int half, int out_half, F f) {
  with_type(half, [&](auto in) { with_type(out_half, [&](auto out) { f(in, out); }); });
}

}  // namespace

// `Call` of kernels/rows_cpp.py. Strides count elements from one row to the next. Sums, per-row numbers, ids and
// owned are contiguous.
struct Call {
  const void *student, *teacher;
  void* out;
  float* sums;
  const float* per_row;
  const int64_t* ids;
  const uint8_t* owned;
  int64_t rows, columns, student_stride, teacher_stride, out_stride;
  int32_t half, out_half, both, threads;
  float beta;
};

extern "C" {

void divergence_sums(const Call* c) {
  with_type(c->half, [&](auto in) {
    using T = typename decltype(in)::type;
    auto row = c->both ? divergence_row<T, true> : divergence_row<T, false>;
    each_row(c->rows, c->threads, [&](long i) {
      row((const T*)c->student + i * c->student_stride, (const T*)c->teacher + i * c->teacher_stride, c->columns,
          c->sums + i, c->rows);
    });
  });
}

void divergence_gradient(const Call* c) {
  with_types(c->half, c->out_half, [&](auto in, auto out) {
    using T = typename decltype(in)::type;
    using O = typename decltype(out)::type;
    each_row(c->rows, c->threads, [&](long i) {
      const float* r = c->per_row + i;
      auto row = r[4 * c->rows] == 0.f ? divergence_gradient_row<T, O, false> : divergence_gradient_row<T, O, true>;
      row((const T*)c->student + i * c->student_stride, (const T*)c->teacher + i * c->teacher_stride, c->columns, r,
          c->rows, (O*)c->out + i * c->out_stride);
    });
  });
}

void jsd_sums(const Call* c) {
  with_type(c->half, [&](auto in) {
    using T = typename decltype(in)::type;
    each_row(c->rows, c->threads, [&](long i) {
      jsd_row((const T*)c->student + i * c->student_stride, (const T*)c->teacher + i * c->teacher_stride, c->columns,
              c->per_row + i, c->rows, c->beta, c->sums + i);
    });
  });
}

void jsd_gradient(const Call* c) {
  with_types(c->half, c->out_half, [&](auto in, auto out) {
    using T = typename decltype(in)::type;
    using O = typename decltype(out)::type;
    each_row(c->rows, c->threads, [&](long i) {
      jsd_gradient_row((const T*)c->student + i * c->student_stride, (const T*)c->teacher + i * c->teacher_stride,
                       c->columns, c->per_row + i, c->rows, c->beta, (O*)c->out + i * c->out_stride);
    });
  });
}

void token_sums(const Call* c) {
  with_type(c->half, [&](auto in) {
    using T = typename decltype(in)::type;
    each_row(c->rows, c->threads, [&](long i) {
      token_row((const T*)c->student + i * c->student_stride, c->columns, c->ids[i], c->owned[i], c->sums + i, c->rows);
    });
  });
}

void token_gradient(const Call* c) {
  with_types(c->half, c->out_half, [&](auto in, auto out) {
    using T = typename decltype(in)::type;
    using O = typename decltype(out)::type;
    each_row(c->rows, c->threads, [&](long i) {
      token_gradient_row((const T*)c->student + i * c->student_stride, c->columns, c->ids[i], c->owned[i],
                         c->per_row + i, c->rows, (O*)c->out + i * c->out_stride);
    });
  });
}

}  // extern "C"
